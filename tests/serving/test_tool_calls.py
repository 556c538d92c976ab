from __future__ import annotations

import json
from typing import Any

import pytest

from parley.serving.tool_calls import may_be_call, tool_calls

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": name}} for name in ("look", "sail")]


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ('{"name": "look", "parameters": {"at": "sea"}}', [("look", {"at": "sea"})]),
        ('\n {"name": "look", "parameters": {}} ', [("look", {})]),
        (
            '{"type": "function", "name": "look", "parameters": {"at": ["a", {"b": 1.5}]}}',
            [("look", {"at": ["a", {"b": 1.5}]})],
        ),
        ('{"name": "sail", "arguments": {"to": "Île"}}', [("sail", {"to": "Île"})]),
        ('{"name": "sail"}', [("sail", {})]),
        (
            '{"name": "look", "parameters": {}}; {"name": "sail", "parameters": {"to": "x"}}',
            [("look", {}), ("sail", {"to": "x"})],
        ),
    ],
)
def test_calls_are_read(text: str, called: list[tuple[str, dict[str, Any]]]) -> None:
    calls = tool_calls(text, TOOLS)
    assert calls is not None
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == called
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I look at the sea.",
        '{"name": "look", "parameters": {"at": "sea"',
        '{"name": "look", "parameters": {}} and so on',
        '{"name": "look", "parameters": {}} {"name": "look", "parameters": {}}',
        '{"name": "jump", "parameters": {}}',
        '{"name": ["look"], "parameters": {}}',
        '{"name": "look", "parameters": "sea"}',
        '[{"name": "look"}]',
        '{"a": ' * 50_000,
    ],
)
def test_anything_else_is_words(text: str) -> None:
    assert tool_calls(text, TOOLS) is None


def test_words_are_told_from_what_may_become_a_call() -> None:
    assert all(map(may_be_call, ["", " \n", "{", ' {"na']))
    assert not any(map(may_be_call, ["A", " I say {", "[", '"{']))
