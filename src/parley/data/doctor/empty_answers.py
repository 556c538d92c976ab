"""Assistant turns without text, which parsing leaves out: found in the row as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parley.config import DataSection
from parley.data.example import REASONING_KEYS, Example
from parley.data.files import Row
from parley.data.formats import Format
from parley.data.messages import CONTENT_KEYS, ROLE_KEYS, ROLES
from parley.data.tool_calls import parse_json

_TURN_COLUMNS = ("messages", "conversations", "completion")


def empty_answer(row: Row, example: Example, format: Format, data: DataSection) -> str | None:
    """Where `row` has an answer without text; None where it has none such."""
    fields = format.fields(row, example.origin, data)
    turns = next((fields.value(column) for column in _TURN_COLUMNS if column in fields.own), None)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # CSV
        turns = parse_json(turns, example.origin)
    if isinstance(turns, list):
        return next((f"turn {number} is empty" for number in _empty_turns(turns, data)), None)
    if example.messages is not None:  # an instruction with its answer
        answered = bool(example.messages) and example.messages[-1]["role"] == "assistant"
        return None if answered else "the answer is empty"
    texts = (example.completion, example.text)
    return "the answer is empty" if any(isinstance(text, str) and not text.strip() for text in texts) else None


def _empty_turns(turns: list[Any], data: DataSection) -> Iterator[int]:
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and _is_assistant(turn, data) and not _says(turn, data):
            yield number


def _is_assistant(turn: dict[str, Any], data: DataSection) -> bool:
    key = data.columns.get("role") or next((key for key in ROLE_KEYS if key in turn), "role")
    name = turn.get(key)
    return isinstance(name, str) and ROLES.get(data.roles.get(name, name).strip().lower()) == "assistant"


def _says(turn: dict[str, Any], data: DataSection) -> bool:
    keys = (data.columns.get("content", "content"), *CONTENT_KEYS, *REASONING_KEYS, "tool_calls", "function_call")
    values = (turn.get(key) for key in keys)
    return any(value.strip() if isinstance(value, str) else value for value in values)
