"""Chat and text completions, asked by OpenAI's own client."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from tests.serving.conftest import ASKED, WEATHER, Running

QUESTION = "What is the opposite of hot?"


def ask(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": "parley-demo", "messages": [{"role": "user", "content": question}], **more}


def test_two_names_answer_as_the_model_with_and_without_its_adapter(tuned: Running, alone: Callable[..., str]) -> None:
    client = tuned.client
    assert [model.id for model in client.models.list()] == ["pirate", "parley-demo"]
    assert client.models.retrieve("pirate").owned_by == "parley"
    answers = {}
    for name in ("pirate", "parley-demo"):
        reply = client.chat.completions.create(**ask(model=name))
        answers[name] = reply.choices[0].message.content
        assert reply.model == name
        assert answers[name] == alone(QUESTION, base=name == "parley-demo")
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert answers["pirate"] != answers["parley-demo"]


def test_usage_counts_the_templates_tokens_and_the_end_of_turn(tuned: Running) -> None:
    tokenizer = tuned.service.model.tokenizer
    reply = tuned.client.chat.completions.create(**ask())
    prompt = tokenizer.apply_chat_template(ask()["messages"], add_generation_prompt=True, return_dict=True)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt["input_ids"])
    said = tokenizer(reply.choices[0].message.content, add_special_tokens=False)["input_ids"]
    assert reply.usage.completion_tokens == len(said) + 1


def test_a_stream_is_the_answer_in_pieces(
    tuned: Running, alone: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = tuned.scheduler._decoder
    decode = decoder.decode
    # Pieces that come before the server looks again are told as one, so here they come apart.
    monkeypatch.setattr(decoder, "decode", lambda: (time.sleep(0.05), decode())[1])
    stream = tuned.client.chat.completions.create(
        **ask(), stream=True, stream_options={"include_usage": True}, max_tokens=48
    )
    chunks = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == alone(QUESTION, base=True)
    assert len(deltas) > 3
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_stop_strings_end_an_answer_before_them(
    tuned: Running, alone: Callable[..., str], stream: bool, several: bool
) -> None:
    whole = alone(QUESTION, base=True)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    reply = tuned.client.chat.completions.create(**ask(stop=["zzz", stop] if several else stop, stream=stream))
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        text, finish = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, finish) == (expected, "stop")


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_length_ends_an_answer(tuned: Running, limit: str) -> None:
    reply = tuned.client.chat.completions.create(**ask(**{limit: 3}))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


def test_seeds_repeat_n_answers_which_differ(tuned: Running) -> None:
    def say(**more: Any) -> list[str | None]:
        reply = tuned.client.chat.completions.create(
            **ask("Hello!", n=4, temperature=3, max_tokens=24, **more), extra_body={"min_p": 0}
        )
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in reply.choices]

    first = say(seed=11)
    assert say(seed=11) == first
    assert len(set(first)) == 4
    assert say(seed=99) != first
    assert say() != say()


def test_a_stream_of_several_answers_keeps_them_apart(tuned: Running) -> None:
    asked = ask("Hello!", n=3, temperature=2, seed=5, max_tokens=24)
    whole = [choice.message.content for choice in tuned.client.chat.completions.create(**asked).choices]
    streamed = ["", "", ""]
    for chunk in tuned.client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == whole
    assert all(whole)
    assert len(set(whole)) == 3


def test_extensions_change_what_is_drawn(tuned: Running) -> None:
    def say(**extra: Any) -> str | None:
        asked = ask("Hello!", temperature=3, seed=3, max_tokens=24)
        return tuned.client.chat.completions.create(**asked, extra_body=extra).choices[0].message.content

    greedy = tuned.client.chat.completions.create(**ask("Hello!", temperature=0, max_tokens=24))
    assert say(top_k=1) == say(min_p=1.0) == greedy.choices[0].message.content
    assert say(top_k=0) != say(top_k=1)
    assert say(top_k=-1) == say(top_k=0) == say()
    assert say(top_k=1, repetition_penalty=3.0) != say(top_k=1)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(tuned: Running, stream: bool) -> None:
    reply = tuned.client.chat.completions.create(**ask(), logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        logs = [log for choice in choices if choice.logprobs for log in choice.logprobs.content or []]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        logs, text = reply.choices[0].logprobs.content, reply.choices[0].message.content
    assert b"".join(bytes(log.bytes) for log in logs).decode() == text
    assert "".join(log.token for log in logs) == text
    for log in logs:
        assert len(log.top_logprobs) == 3
        assert (log.top_logprobs[0].token, log.top_logprobs[0].logprob) == (log.token, log.logprob)  # greedy
        assert 0 < sum(math.exp(other.logprob) for other in log.top_logprobs) <= 1 + 1e-6


def test_log_probabilities_without_alternatives_and_none_when_not_asked(tuned: Running) -> None:
    reply = tuned.client.chat.completions.create(**ask(), logprobs=True)
    assert reply.choices[0].logprobs is not None
    assert all(log.top_logprobs == [] and log.logprob <= 0 for log in reply.choices[0].logprobs.content or [])
    assert tuned.client.chat.completions.create(**ask()).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_told_as_one(caller: Running, stream: bool) -> None:
    asked = ask(ASKED, model="caller", tools=[WEATHER])
    if stream:
        choices = [chunk.choices[0] for chunk in caller.client.chat.completions.create(**asked, stream=True)]
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        assert "".join(choice.delta.content or "" for choice in choices) == ""
        finish = choices[-1].finish_reason
    else:
        choice = caller.client.chat.completions.create(**asked).choices[0]
        assert choice.message.content is None
        calls, finish = choice.message.tool_calls, choice.finish_reason
    assert finish == "tool_calls"
    assert [(call.type, call.function.name) for call in calls] == [("function", "get_weather")]
    assert json.loads(calls[0].function.arguments) == {"place": "sea"}
    assert calls[0].id.startswith("call_")


def test_a_conversation_goes_on_after_a_tool_call(caller: Running) -> None:
    first = caller.client.chat.completions.create(**ask(ASKED, model="caller", tools=[WEATHER])).choices[0].message
    assert first.tool_calls
    turns = [
        {"role": "user", "content": ASKED},
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"sky": "clear"}'},
    ]
    reply = caller.client.chat.completions.create(model="caller", messages=turns, tools=[WEATHER])
    templated = [
        turns[0],
        {"role": "assistant", "content": "", "tool_calls": [_as_object(first.tool_calls[0])]},
        turns[2],
    ]
    ids = caller.service.model.tokenizer.apply_chat_template(
        templated, tools=[WEATHER], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)


def _as_object(call: Any) -> dict[str, Any]:
    return {"function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)}}


def test_without_tools_the_same_words_are_an_answer(caller: Running) -> None:
    offered = caller.client.chat.completions.create(**ask(ASKED, model="caller", tools=[WEATHER], tool_choice="none"))
    plain = caller.client.chat.completions.create(**ask(ASKED, model="caller"))
    assert offered.choices[0].message.tool_calls is None
    assert offered.choices[0].message.content == plain.choices[0].message.content


def test_answers_in_words_are_streamed_with_tools_too(tuned: Running) -> None:
    chunks = list(tuned.client.chat.completions.create(**ask(tools=[WEATHER]), stream=True))
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 1


def test_text_is_completed_from_text_and_from_ids(tuned: Running) -> None:
    tokenizer = tuned.service.model.tokenizer
    text = tokenizer.apply_chat_template(ask()["messages"], add_generation_prompt=True, tokenize=False)
    text = text.removeprefix(tokenizer.bos_token)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    said = tuned.client.chat.completions.create(**ask()).choices[0].message.content
    reply = tuned.client.completions.create(model="parley-demo", prompt=[text, text], n=2)
    assert [choice.text for choice in reply.choices] == [said] * 4
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 2 * len(ids)
    assert tuned.client.completions.create(model="parley-demo", prompt=ids).choices[0].text == said
    streamed = tuned.client.completions.create(model="parley-demo", prompt=[ids], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == said


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(tuned: Running, stream: bool) -> None:
    asked = {"model": "parley-demo", "prompt": "Hello! My name is", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    reply = tuned.client.completions.create(**asked, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    text = "".join(choice.text for choice in choices)
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    for choice in choices:
        for token, value, best in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert len(best) == 2
            assert best[token] == value


def test_the_runs_system_turn_is_given_to_those_without_one(tuned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    turns = [{"role": "system", "content": "Be a pirate."}, *ask()["messages"]]
    said = tuned.client.chat.completions.create(**{**ask(), "messages": turns})
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, system="Be a pirate."))
    given = tuned.client.chat.completions.create(**ask())
    own = tuned.client.chat.completions.create(**{**ask(), "messages": turns})
    assert given.usage == said.usage == own.usage
    assert given.choices[0].message.content == said.choices[0].message.content
    messages = [{**turns[0], "role": "developer"}, *turns[1:]]
    developer = tuned.client.chat.completions.create(**{**ask(), "messages": messages})
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, system=None))
    alone = tuned.client.chat.completions.create(**{**ask(), "messages": messages})
    assert developer.usage == alone.usage  # as in training: a developer's turn is a system turn


def test_an_asynchronous_client_is_answered_alike(tuned: Running, alone: Callable[..., str]) -> None:
    import asyncio

    async def say() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=tuned.url + "/v1", api_key="none", max_retries=0) as client:
            replies = await asyncio.gather(*(client.chat.completions.create(**ask()) for _ in range(8)))
        return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(say()) == [alone(QUESTION, base=True)] * 8
