"""What clients do wrong: each is told in one line, in OpenAI's form, and the server answers on."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serving.conftest import WEATHER, Running

HELLO = [{"role": "user", "content": "Hello!"}]


def post(running: Running, body: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> Any:
    """The status and the reply's JSON, without any client in between."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    told = json.loads(reply.read())
    connection.close()
    return reply.status, told


def refused(running: Running, body: bytes | dict[str, Any], **more: Any) -> dict[str, Any]:
    """The error in a refusal, once it is seen to be one in OpenAI's form."""
    status, told = post(running, body, **more)
    assert list(told) == ["error"]
    error = told["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    return {"status": status, **error}


@pytest.fixture(autouse=True)
def answers_on(tuned: Running) -> Iterator[None]:
    yield
    assert tuned.client.chat.completions.create(model="pirate", messages=HELLO, max_tokens=2).choices  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"temperature": -0.5}, "temperature", "temperature: got -0.5; wanted greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature: got 'hot'; wanted a valid number"),
        ({"temperature": float("inf")}, "temperature", "temperature: got inf; wanted less than or equal to 100"),
        ({"temperature": float("nan")}, "temperature", "temperature: got nan; wanted"),
        ({"top_p": 0}, "top_p", "top_p: got 0; wanted greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: got 0; wanted greater than or equal to 1"),
        ({"n": 17}, "n", "n: got 17; wanted less than or equal to 16"),
        ({"n": 1.5}, "n", "n: got 1.5; wanted a valid integer"),
        ({"seed": 2**63}, "seed", "seed: got 9223372036854775808; wanted less than"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "stop: got a list of 5; list should have at most 4 items"),
        ({"stop": ["a", ""]}, "stop[1]", "stop[1]: got ''; string should have at least 1 character"),
        ({"stop": "x" * 300}, "stop[0]", "stop[0]: got 'xxx"),
        ({"stop": 7}, "stop", "stop: got 7; wanted a valid list"),
        ({"messages": []}, "messages", "messages: got a list of 0; list should have at least 1 item"),
        ({"messages": "Hello!"}, "messages", "messages: got 'Hello!'; wanted a valid list"),
        ({"messages": [{"role": "captain", "content": "Hello!"}]}, "messages", "messages: turn 1 has role 'captain'"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "messages: all turns are empty"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs: only with logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: got 21; wanted less than"),
        ({"stream_options": {}}, "stream_options", "stream_options: only with stream: true"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty: not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format: not supported"),
        ({"temprature": 1}, "temprature", "temprature: no such field"),
        ({"tools": [{"type": "function"}]}, "tools", "tools: got a list of 1; wanted objects with"),
    ],
)
def test_wrong_values_are_named(tuned: Running, changed: dict[str, Any], param: str, message: str) -> None:
    error = refused(tuned, {"model": "pirate", "messages": HELLO, **changed})
    assert (error["status"], error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": [0, 5, 1280]}, "prompt"),
        ({"prompt": [0, -1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 4}, "n"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({}, "prompt"),
    ],
)
def test_wrong_prompts_are_named(tuned: Running, changed: dict[str, Any], param: str) -> None:
    error = refused(tuned, {"model": "pirate", **changed}, path="/v1/completions")
    assert (error["status"], error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": ', "the body is not valid JSON: EOF while parsing a value at line 1 column 10"),
        (b"", "the body is not valid JSON"),
        (b"[1, 2]", "the body must be a JSON object"),
        (b"\xff\xfe\x00{", "the body"),
        (b'{"a":' * 100_000, "the body is not valid JSON: recursion limit exceeded"),
        (b'{"model": "\\ud800"}', "half a character, a lone surrogate"),
        (b'{"model": "\xed\xa0\x80"}', "the body is not valid JSON: invalid unicode code point"),
    ],
)
def test_broken_json_is_told(tuned: Running, body: bytes, message: str) -> None:
    error = refused(tuned, body)
    assert error["status"] == 400
    assert message in error["message"]


def test_a_body_that_is_not_said_to_be_json_is_refused(tuned: Running) -> None:
    """A page in a browser can send text to this machine without asking; it must ask before it sends JSON."""
    body = {"model": "pirate", "messages": HELLO}
    error = refused(tuned, body, **{"Content-Type": "text/plain"})
    assert (error["status"], error["param"]) == (400, None)
    assert "application/json" in error["message"]


def test_a_megabyte_of_stop_strings_is_refused(tuned: Running) -> None:
    stops = ["x" * 1000] * 1000
    with pytest.raises(openai.BadRequestError, match="stop"):
        tuned.client.chat.completions.create(model="pirate", messages=HELLO, stop=stops)  # type: ignore[arg-type]


def test_unknown_models_and_routes_are_not_found(tuned: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is pirate and parley-demo") as told:
        tuned.client.chat.completions.create(model="gpt-9", messages=HELLO)  # type: ignore[arg-type]
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        tuned.client.models.retrieve("owner/model")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: no such route"):
        tuned.client.embeddings.create(model="pirate", input="a")
    assert refused(tuned, {}, path="/v1/models")["status"] == 405


def test_a_prompt_longer_than_the_context_is_refused(tuned: Running) -> None:
    long = [{"role": "user", "content": "What is the opposite of hot? " * 100}]
    with pytest.raises(openai.BadRequestError, match=r"tokens and the context is 512 tokens, output included") as told:
        tuned.client.chat.completions.create(model="pirate", messages=long)  # type: ignore[arg-type]
    assert (told.value.code, told.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as told:
        tuned.client.completions.create(model="pirate", prompt=[5] * 512)
    assert told.value.code == "context_length_exceeded"
    fits = tuned.client.completions.create(model="pirate", prompt=[5] * 511)
    assert fits.usage is not None
    assert fits.usage.completion_tokens == 1


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-3},
        {"temperature": 100, "min_p": 0},
        {"temperature": 1, "top_p": 1e-300},
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "top_k": 2**31 - 1},
        {"temperature": 1, "repetition_penalty": 10},
        {"temperature": 1, "repetition_penalty": 0.1},
        {"max_tokens": 10**30, "stop": ["a", "e", "i", "o"]},
        {"seed": -(2**63), "temperature": 1},
        {"seed": 2**63 - 1, "temperature": 1, "n": 4},
        {"logprobs": True, "top_logprobs": 20, "temperature": 100, "n": 16},
    ],
)
def test_extreme_values_are_answered(tuned: Running, extreme: dict[str, Any]) -> None:
    status, told = post(tuned, {"model": "pirate", "messages": HELLO, "max_tokens": 12, **extreme})
    assert status == 200, told
    assert len(told["choices"]) == extreme.get("n", 1)
    assert tuned.scheduler.error is None


def test_tools_that_the_template_does_not_write_are_refused(endless: Running) -> None:
    name = next(iter(endless.service.model.names))
    with pytest.raises(openai.BadRequestError, match="the model's chat template ignores tools"):
        endless.client.chat.completions.create(model=name, messages=HELLO, tools=[WEATHER])  # type: ignore[arg-type]


def test_a_base_model_without_a_template_completes_and_does_not_chat(
    serving: Callable[..., Running], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama_folder, folder)
    (folder / "chat_template.jinja").unlink()
    running = serving(folder, max_num_seqs=1, max_model_len=64)
    assert running.client.completions.create(model="base", prompt="Ahoy", max_tokens=3).choices[0].text
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        running.client.chat.completions.create(model="base", messages=HELLO)  # type: ignore[arg-type]


def test_a_key_is_asked_for_everywhere_but_at_health(serving: Callable[..., Running], tiny_llama_folder: Path) -> None:
    running = serving(tiny_llama_folder, max_num_seqs=1, max_model_len=64, api_key="open sesame")
    assert len(running.client.models.list().data) == 1
    for wrong in ("none", "open sesam", "open sesame!", "", "ключ"):
        error = refused(running, {}, Authorization=f"Bearer {wrong}".encode().decode("latin-1"))
        assert (error["status"], error["code"]) == (401, "invalid_api_key")
    assert "no API key was sent" in refused(running, {})["message"]
    running.api_key = "wrong"
    with pytest.raises(openai.AuthenticationError):
        running.client.models.list()
    for path, status in [("/metrics", 401), ("/openapi.json", 401), ("/health", 200)]:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()


def test_a_control_token_as_a_stop_string_ends_the_answer_and_a_mixture_is_refused(tuned: Running) -> None:
    """Decoding leaves control tokens out of the text, so that a stop string with one in it could never match."""
    tokenizer = tuned.service.model.tokenizer
    end = tokenizer.convert_ids_to_tokens(sorted(tuned.scheduler._stop_ids)[0])
    ask = {"model": "pirate", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    status, told = post(tuned, {**ask, "stop": end})
    assert status == 200, told
    assert told["choices"][0]["message"]["content"] == post(tuned, ask)[1]["choices"][0]["message"]["content"]
    error = refused(tuned, {**ask, "stop": ["a", f"x{end}"]})
    assert error["status"] == 400
    assert end in error["message"]
