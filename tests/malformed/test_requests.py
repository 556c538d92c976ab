"""Malformed HTTP requests: each is refused with 4xx in OpenAI's form, and the server is well afterwards."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.malformed.conftest import check_line
from tests.serving.conftest import Running, serving  # noqa: F401  (a fixture)

from parley.config import DEMO_MODEL
from parley.serving.protocol import ChatRequest, CompletionRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello!"}]
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"model": DEMO_MODEL, "messages": HELLO, "max_tokens": 1},
    TEXT: {"model": DEMO_MODEL, "prompt": "Hello!", "max_tokens": 1},
}
Send = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def server(serving: Callable[..., Running]) -> Running:  # noqa: F811
    return serving(DEMO_MODEL, max_num_seqs=4, max_model_len=256)


@pytest.fixture(scope="module")
def send(server: Running) -> Iterator[Send]:
    """`send(body, path, ...)`: the status and the parsed reply, over one connection that is kept open."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def request(body: Any, path: str = CHAT, method: str = "POST", kind: str = "application/json") -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, raw, {"Content-Type": kind} if kind else {})
            reply = connection.getresponse()
        except (http.client.HTTPException, ConnectionError):  # closed while it was idle: once more
            connection.close()
            connection.request(method, path, raw, {"Content-Type": kind} if kind else {})
            reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if text else None

    yield request
    status, reply = request({**VALID[CHAT], "temperature": 0, "max_tokens": 4})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 4)
    connection.close()


@pytest.fixture(autouse=True)
def well_afterwards(server: Running, send: Send, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert send(b"", "/health", "GET") == (200, {"status": "ok"})
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def refused(status: int, reply: Any) -> None:
    assert 400 <= status < 500, (status, reply)
    assert list(reply) == ["error"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    check_line(reply["error"]["message"])
    assert len(reply["error"]["param"] or "") <= 80


JUNK: dict[str, Any] = {
    "object": {},
    "nested": {"a": {"b": [None, {"c": []}]}},
    "empty list": [],
    "list of null": [None],
    "mixed list": [1, "a", None, [], {}],
    "empty text": "",
    "text": "x",
    "control characters": "\x00\x1b[31m\x9b\u202e\r\n",
    "long text": "[/x]" * 50_000,
    "true": True,
    "negative": -1,
    "float": 0.5,
    "huge": 10**400,
    "infinity": float("inf"),
    "not a number": float("nan"),
}
FREE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # accepted and not read
FIELDS = [
    (path, field)
    for path, kind in ((CHAT, ChatRequest), (TEXT, CompletionRequest))
    for field in kind.model_fields
    if field not in FREE | {"stream"}  # true is right, and no JSON comes back
]


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_values_of_a_wrong_kind(send: Send, path: str, field: str) -> None:
    """15 values for each field of both routes; those that happen to be right are answered."""
    answered = []
    for name, value in JUNK.items():
        status, reply = send({**VALID[path], field: value}, path)
        if status == 200:
            answered.append(name)
        else:
            refused(status, reply)
    assert len(answered) <= 6, answered  # "n: true" is no integer; a prompt may be any text


WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: dict[str, Any] = {
    "no role": [{"content": "Hello!"}],
    "role of a number": [{"role": 1, "content": "Hello!"}],
    "role of a list": [{"role": ["user"], "content": "Hello!"}],
    "role with escapes": [{"role": "\x1b[2J", "content": "Hello!"}],
    "long role": [{"role": "user" * 100_000, "content": "Hello!"}],
    "content of a number": [{"role": "user", "content": 7}],
    "parts that are no objects": [{"role": "user", "content": [1, 2]}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "a text part of a number": [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    "nothing said": [{"role": "user", "content": ""}],
    "only white space": [{"role": "user", "content": " \n\t"}],
    "null": [None],
    "calls of a number": [*HELLO, {"role": "assistant", "tool_calls": 5}],
    "a call of a number": [*HELLO, {"role": "assistant", "tool_calls": [5]}],
    "a call without a name": [*HELLO, {"role": "assistant", "tool_calls": [{**CALL, "function": {}}]}],
    "arguments that are no JSON": [
        *HELLO,
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{"}}]},
    ],
    "deep arguments": [
        *HELLO,
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[" * 50_000}}]},
    ],
    "longer than the context": [{"role": "user", "content": "ahoy " * 300}],
    "more turns than the context": HELLO * 300,
    "a megabyte": [{"role": "user", "content": "ahoy " * 200_000}],
}
PROMPTS: dict[str, Any] = {
    "no prompts": [],
    "no ids": [[]],
    "a negative id": [-1],
    "an id past the embedding": [10**6],
    "an id of 400 digits": [10**400],
    "a fraction": [1.5],
    "ids as text": [["1"]],
    "true": [True],
    "mixed": ["a", [1]],
    "too many": ["a"] * 17,
    "nested": [[[1]]],
    "longer than the context": [5] * 256,
    "a megabyte": "ahoy " * 200_000,
    "null": None,
}
EXTRA: dict[str, dict[str, Any]] = {
    "unknown": {"temprature": 1},
    "unknown with escapes": {"\x1b[31mred": 1},
    "a long unknown": {"x" * 500_000: 1},
    "thousands of unknowns": {f"field{number}": 1 for number in range(5000)},
    "stream options without stream": {"stream_options": {"include_usage": True}},
    "unknown stream option": {"stream": True, "stream_options": {"usage": True}},
    "many answers": {"n": 17},
    "json mode": {"response_format": {"type": "json_object"}},
    "a penalty": {"presence_penalty": 1.0},
    "log-probabilities without the switch": {"top_logprobs": 1},
    "a forced call": {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a tool of another type": {"tools": [{"type": "code", "function": WEATHER}]},
    "tools of a number": {"tools": [1]},
    "five stops": {"stop": list("abcde")},
    "a long stop": {"stop": "x" * 257},
    "an empty stop": {"stop": [""]},
    "audio": {"modalities": ["audio"]},
    "a model with escapes": {"model": "\x1b[2J\u202e"},
    "a long model": {"model": "x" * 500_000},
    "no model of that name": {"model": "gpt-9"},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_conversations(send: Send, name: str) -> None:
    refused(*send({**VALID[CHAT], "messages": MESSAGES[name]}))


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(send: Send, name: str) -> None:
    refused(*send({**VALID[TEXT], "prompt": PROMPTS[name]}, TEXT))


@pytest.mark.parametrize("name", EXTRA)
def test_fields(send: Send, name: str) -> None:
    refused(*send({**VALID[CHAT], **EXTRA[name]}))


WHOLE = json.dumps(VALID[CHAT]).encode()
RAW: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n",
    "NUL": b"\x00",
    "a number": b"7",
    "a text": b'"Hello!"',
    "null": b"null",
    "a list": b"[" + WHOLE + b"]",
    "two objects": WHOLE + WHOLE,
    "garbage behind": WHOLE + b"x",
    "garbage before": b"x" + WHOLE,
    "single quotes": WHOLE.replace(b'"', b"'"),
    "a comment": WHOLE[:-1] + b"/* */}",
    "a comma too many": WHOLE[:-1] + b",}",
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "latin-1": '{"model": "é"}'.encode("latin-1"),
    "a cut character": WHOLE[:-2] + b"\xe2\x98",
    "a lone surrogate": b'{"model": "\\ud83d"}',
    "half of another": b'{"model": "\\ude00"}',
    "a surrogate as UTF-8": b'{"model": "\xed\xa0\xbd"}',
    "a wrong escape": b'{"model": "\\x41"}',
    "a raw newline": b'{"model": "a\nb"}',
    "5,000 digits": WHOLE[:-1] + b', "seed": ' + b"1" * 5000 + b"}",
    "1e999": WHOLE[:-1] + b', "temperature": 1e999}',
    "600 lists deep": WHOLE[:-1] + b', "metadata": ' + b"[" * 600 + b"]" * 600 + b"}",
    "600 objects deep": WHOLE[:-1] + b', "metadata": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
    "100,000 deep, not closed": b'{"a":' * 100_000,
    "a form": b"model=x&messages=y",
    **{f"cut after {size} bytes": WHOLE[:size] for size in range(1, len(WHOLE) - 1, 7)},
}


@pytest.mark.parametrize("name", RAW)
def test_bodies(send: Send, name: str) -> None:
    refused(*send(RAW[name]))


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", CHAT, ""),
        ("POST", CHAT, "text/plain"),
        ("POST", CHAT, "application/json5"),
        ("POST", CHAT, "multipart/form-data; boundary=x"),
        ("POST", "/", "application/json"),
        ("POST", "/v1/embeddings", "application/json"),
        ("POST", "/v1/chat/completions/x", "application/json"),
        ("POST", "/v1/models", "application/json"),
        ("POST", "/" + "x" * 8000, "application/json"),
        ("POST", "/%00%1b%5b2J%e2%80%ae", "application/json"),
        ("POST", "/%ff%fe", "application/json"),
        ("GET", CHAT, "application/json"),
        ("DELETE", "/v1/models/parley-demo", "application/json"),
        ("GET", "/v1/models/%00", "application/json"),
        ("GET", "/v1/models/../../etc/passwd", "application/json"),
        ("GET", "/docs", "application/json"),
        ("GET", "/openapi.yaml", "application/json"),
    ],
)
def test_routes_and_media_types(send: Send, method: str, path: str, kind: str) -> None:
    refused(*send(WHOLE, path, method, kind))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "developer"]) | ANYTHING,
            "content": ANYTHING,
            "tool_calls": ANYTHING,
            "name": ANYTHING,
            "weight": ANYTHING,
            "reasoning_content": ANYTHING,
        },
    ),
    max_size=4,
)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=TURNS | ANYTHING, tools=st.none() | ANYTHING)
def test_any_conversation_is_answered_or_refused(send: Send, messages: Any, tools: Any) -> None:
    body = {**VALID[CHAT], "messages": messages, "tools": tools}
    status, reply = send(json.dumps(body).encode("utf-8", "surrogatepass"))
    if status != 200:
        refused(status, reply)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=st.dictionaries(st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields]), ANYTHING))
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_any_fields_are_answered_or_refused(send: Send, path: str, body: dict[str, Any]) -> None:
    status, reply = send(json.dumps({**VALID[path], **body, "max_tokens": 1, "stream": False}).encode(), path)
    if status != 200:
        refused(status, reply)
