"""From a request to prompt ids: bounded before tokenizing, off the event loop, with the ids that training has."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from tests.serving.conftest import Running
from tests.serving.test_errors import HELLO, post, refused

from parley.data.example import Example
from parley.data.render import render_example, render_prompt
from parley.data.template_settings import pin_settings
from parley.inference.generate import Generator
from parley.serving import service as service_module
from parley.serving.loading import load_for_inference
from parley.serving.protocol import ChatRequest, CompletionRequest, parse_body
from parley.serving.service import ServedModel, Service
from parley.training.run_folder import RunFolder

MODEL = {"model": "pirate"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The length of what is rendered or tokenized, and the thread that does it."""
    seen: list[tuple[int, str]] = []

    def recorded(function: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def record(tokenizer: Any, text: Any, *more: Any) -> list[int]:
            seen.append((len(text if isinstance(text, str) else str(text)), threading.current_thread().name))
            return function(tokenizer, text, *more)

        return record

    for name in ("render_prompt", "_encode_text"):
        monkeypatch.setattr(service_module, name, recorded(getattr(service_module, name)))
    return seen


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "ahoy " * 800_000}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "ahoy " * 800_000]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ahoy " * 800_000}]}, "messages"),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {
            "name": "f", "description": "x" * 2_000_000}}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 100_000}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 100_000}, "messages"),
        ("/v1/completions", {"prompt": [5] * 1_000_000}, "prompt"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    tuned: Running, calls: list[tuple[int, str]], path: str, body: dict[str, Any], param: str
) -> None:
    error = refused(tuned, {**MODEL, **body}, path=path)
    assert (error["status"], error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert max((length for length, _ in calls), default=0) < 10


def test_the_longest_text_that_fits_is_not_refused(tuned: Running) -> None:
    """The bound holds for every token: a prompt of the longest one, as often as the context takes."""
    tokenizer = tuned.service.model.tokenizer
    longest = max(
        tokenizer.get_vocab(), key=lambda token: len(tokenizer.decode([tokenizer.convert_tokens_to_ids(token)]))
    )
    text = tokenizer.decode([tokenizer.convert_tokens_to_ids(longest)]) * 500
    reply = tuned.client.completions.create(model="pirate", prompt=text, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 501


def test_tokenizing_leaves_the_event_loop(tuned: Running, calls: list[tuple[int, str]]) -> None:
    tuned.client.chat.completions.create(model="pirate", messages=HELLO, max_tokens=1)  # type: ignore[arg-type]
    tuned.client.completions.create(model="pirate", prompt="Ahoy", max_tokens=1)
    assert len(calls) == 2
    assert all(name.startswith("parley-parse") for _, name in calls)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [1] * 1000}),
        (ChatRequest, {"messages": HELLO, "tools": [1] * 1000}),
        (ChatRequest, {"messages": HELLO, "stop": [1] * 1000}),
        (ChatRequest, {"messages": HELLO, **{f"field{number}": 1 for number in range(1000)}}),
        (ChatRequest, {"messages": HELLO, "stream_options": {f"field{number}": 1 for number in range(1000)}}),
        (ChatRequest, {"messages": HELLO, "logit_bias": {f"field{number}": [] for number in range(1000)}}),
        (CompletionRequest, {"prompt": [1.5] * 1000}),
        (CompletionRequest, {"prompt": ["a"] * 1000}),
        (CompletionRequest, {"prompt": [["a"] * 1000]}),
        (CompletionRequest, {"prompt": [[1]] * 1000}),
    ],
)
def test_a_wrong_body_makes_few_errors(kind: Any, body: dict[str, Any]) -> None:
    """pydantic makes an object for each wrong element; a body of a million took 25 to 57 seconds."""
    with pytest.raises(pydantic.ValidationError) as error_info:
        parse_body(kind, json.dumps({**MODEL, **body}).encode())
    assert error_info.value.error_count() <= 2


@pytest.mark.parametrize("depth", [190, 600, 100_000])
@pytest.mark.parametrize("field", ["metadata", "messages", "tools"])
def test_deep_nesting_is_answered_or_refused(tuned: Running, depth: int, field: str) -> None:
    deep = "[" * depth + "]" * depth
    values = {
        "metadata": deep,
        "messages": f'[{{"role": "user", "content": "a", "note": {deep}}}]',
        "tools": f'[{{"type": "function", "function": {{"name": "f", "parameters": {{"a": {deep}}}}}}}]',
    }
    body = {"model": '"pirate"', "messages": json.dumps(HELLO), "max_tokens": "1", field: values[field]}
    raw = "{" + ", ".join(f'"{name}": {value}' for name, value in body.items()) + "}"
    status, told = post(tuned, raw.encode())
    assert status == (200 if depth < 200 else 400) or (field == "tools" and status == 400), told


def text_ids(running: Running, prompt: str) -> list[int]:
    return running.service.completion_prompts(CompletionRequest(model="x", prompt=prompt))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["Hi", "<|begin_of_text|>Hi", " Hi", "", "<|begin_of_text|>"])
@pytest.mark.parametrize("adds", ["bos", "nothing", "bos and eos"])
def test_a_text_prompt_begins_as_text_does_in_training(
    tuned: Running, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any, prompt: str, adds: str
) -> None:
    """One beginning of text, whether the prompt brings it, and whatever the tokenizer adds by itself."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    single = {"bos": f"{bos} $A", "nothing": "$A", "bos and eos": f"{bos} $A {eos}"}[adds]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    trained = render_example(tokenizer, Example("row", text=prompt + "!")).input_ids
    ids = text_ids(tuned, prompt)
    assert ids == trained[: len(ids)]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert len(ids) == len(trained) - 2  # the "!" and the end
    assert text_ids(tuned, "<|begin_of_text|>Hi") == text_ids(tuned, "Hi")


def test_a_tokenizer_without_a_beginning_of_text_adds_nothing(
    tuned: Running, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = None
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    assert text_ids(tuned, "Hi") == tokenizer("Hi", add_special_tokens=False)["input_ids"]


def test_ids_past_the_embedding_are_refused_on_every_route(tuned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with a word more than the embedding has rows: others are served on."""
    tokenizer = copy.deepcopy(tuned.service.model.tokenizer)
    rows = tuned.service.model.vocab_size
    tokenizer.add_tokens([f"filler{number}" for number in range(rows - len(tokenizer))] + ["grog"])
    assert tokenizer.convert_tokens_to_ids("grog") == rows
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    chat = {**MODEL, "messages": [{"role": "user", "content": "grog"}]}
    requests = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/completions", {**MODEL, "prompt": "grog"}),
        ("/v1/completions", {**MODEL, "prompt": [1, rows]}),
        ("/v1/completions", {**MODEL, "prompt": [[1], [rows]], "stream": True}),
    ]
    for path, body in requests:
        error = refused(tuned, body, path=path)
        assert error["status"] == 400
        assert f"got token id {rows}; the model's embedding has ids 0 to {rows - 1}" in error["message"]
    assert tuned.scheduler.error is None


def test_the_size_bound_follows_the_context_and_the_longest_token(tuned: Running) -> None:
    model: ServedModel = tuned.service.model
    bounds = [
        Service(replace(model, max_model_len=length), tuned.scheduler)._max_prompt_bytes for length in (512, 1024)
    ]
    longest = max(len(token.encode()) for token in model.tokenizer.get_vocab())
    assert bounds == [512 * max(longest, 16), 1024 * max(longest, 16)]


def chat_ids(running: Running, messages: Any) -> list[int]:
    return running.service.chat_prompt(ChatRequest(model="x", messages=messages))  # type: ignore[arg-type]


def test_settings_of_the_chat_template_are_the_runs(tuned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.template` stands in the template that a run saves, so that serving writes what training wrote."""
    tokenizer = copy.deepcopy(tuned.service.model.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking %}<think>{% endif %}"
    plain = render_prompt(tokenizer, HELLO)
    pin_settings(tokenizer, {"enable_thinking": True})
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    assert chat_ids(tuned, HELLO) == plain + tokenizer("<think>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("first", ["system", "developer"])
def test_a_conversation_with_a_turn_of_instructions_keeps_it(
    tuned: Running, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """As in training: `data.system` goes to conversations without a system or developer turn."""
    messages = [{"role": first, "content": "Be brief."}, *HELLO]
    without = chat_ids(tuned, messages), chat_ids(tuned, HELLO)
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, system="Be a pirate."))
    assert chat_ids(tuned, messages) == without[0]
    assert chat_ids(tuned, HELLO) != without[1]
    assert chat_ids(tuned, HELLO) == chat_ids(tuned, [{"role": "system", "content": "Be a pirate."}, *HELLO])


def test_a_request_sets_the_chat_template(tuned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(tuned.service.model.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking %}<think>{% endif %}"
    plain = render_prompt(tokenizer, HELLO)
    pin_settings(tokenizer, {"enable_thinking": True})
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    body = ChatRequest(**MODEL, messages=HELLO, chat_template_kwargs={"enable_thinking": False})
    assert tuned.service.chat_prompt(body) == plain
    assert chat_ids(tuned, HELLO) != plain


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_thinkin": True}, "the chat template does not read 'enable_thinkin'; its settings: "),
        ({"messages": []}, "does not read 'messages'"),
        ({"a -%}{{ 1 }}": 1}, "does not read"),
        ({"enable_thinking": "x" * 5000}, "at most 4096 characters"),
        ({"enable_thinking": [[[[[[[[[[1]]]]]]]]]]}, "at most 8 deep"),
        ([1], "valid dictionary"),
    ],
)
def test_settings_that_a_request_cannot_set(
    tuned: Running, monkeypatch: pytest.MonkeyPatch, settings: Any, said: str
) -> None:
    tokenizer = copy.deepcopy(tuned.service.model.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking %}<think>{% endif %}"
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, tokenizer=tokenizer))
    error = refused(tuned, {**MODEL, "messages": HELLO, "chat_template_kwargs": settings})
    assert error["status"] == 400
    assert said in error["message"]


def test_control_tokens_are_those_of_training(tuned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "What is <|eot_id|>?"}]
    end = tuned.service.model.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert chat_ids(tuned, messages).count(end) == chat_ids(tuned, HELLO).count(end)
    monkeypatch.setattr(tuned.service, "model", replace(tuned.service.model, control_tokens="tokens"))
    assert chat_ids(tuned, messages).count(end) == chat_ids(tuned, HELLO).count(end) + 1


def test_a_runs_control_tokens_reach_every_way_to_ask_it(tuned_run: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned_run.path, run)
    settings = yaml.safe_load((run / "run.yaml").read_text())
    settings["data"]["control_tokens"] = "tokens"
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    loaded = load_for_inference(str(run))
    assert loaded.control_tokens == "tokens"
    messages = [{"role": "user", "content": "What is <|eot_id|>?"}]
    wanted = render_prompt(loaded.tokenizer, messages, None, "tokens")
    assert wanted != render_prompt(loaded.tokenizer, messages)
    with Generator(loaded.model, loaded.tokenizer, control_tokens=loaded.control_tokens) as generator:
        assert generator.prompt_ids(messages) == wanted
