"""Turns as data sets write them, OpenAI's way or ShareGPT's, to the messages that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from parley.data.conversation import Message
from parley.data.files import type_name
from parley.errors import DataError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What a data set calls a speaker, to the role that templates know."""


def conversation(turns: Any, origin: str, column: str) -> list[Message]:
    """The messages of a list of turns with role and content, or from and value. Turns without words are dropped,
    unless they call tools, think, or bring a tool's result.

    Raises DataError naming the row and the turn.
    """
    if not isinstance(turns, list):
        raise DataError(f"{origin}: field {column!r} is {type_name(turns)}, wanted a list of turns")
    messages = (_message(turn, f"{origin}: turn {number}") for number, turn in enumerate(turns, 1))
    return [message for message in messages if _says_something(message)]


def text_of(value: Any, place: str) -> str:
    """A text field; null is no text. Raises DataError for anything else, and for text that no tokenizer reads."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place} is {type_name(value)} ({_short(value)}), wanted text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise DataError(f"{place} holds half a character ({half}, a lone surrogate); repair the text") from None
    return value


def tools_of(value: Any, origin: str) -> list[dict[str, Any]] | None:
    """The tools offered to the model, from a list of descriptions or such a list as JSON text; None for none."""
    if isinstance(value, str) and value.strip():
        value = _from_json(value, f"{origin}: field 'tools'")
    value = [value] if isinstance(value, dict) and value else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{origin}: field 'tools' is {type_name(value)}, wanted a list of tool descriptions")
    return value


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{place} is {type_name(turn)}, wanted an object with role and content")
    speaker, words = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(speaker)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place} has {speaker} {_short(role)}, wanted one of {', '.join(ROLES)}")
    more = {name: value for name, value in turn.items() if name not in (speaker, words) and value is not None}
    message: Message = {"role": ROLES[role], "content": _content(turn.get(words), f"{place}: {words!r}")}
    if role == "function_call":
        calls = _from_json(message["content"], f"{place}: {words!r}")
        message["content"], more["tool_calls"] = "", calls if isinstance(calls, list) else [calls]
    calls = more.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{place}: 'tool_calls' is {type_name(calls)}, wanted a list of calls")
        more["tool_calls"] = [_tool_call(call, f"{place}: 'tool_calls'") for call in calls]
    return message | more


def _content(value: Any, place: str) -> str:
    """Text, or the text parts of a list of parts."""
    if not isinstance(value, list):
        return text_of(value, place)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise DataError(f"{place} has a part {_short(kind)}; Parley learns from text alone: remove it")
    return "".join(text_of(part.get("text"), place) for part in value)


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A call as templates take it: the function under `function`, its arguments as an object, numbers as written."""
    if not isinstance(call, dict):
        raise DataError(f"{place} holds {type_name(call)}, wanted an object with name and arguments")
    function = call.get("function")
    if function is None:  # written flat
        function, call = call, {"type": "function"}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place} holds a call without a name; wanted name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{place} of {function['name']}") if arguments.strip() else {}
    function = function | {"arguments": {} if arguments is None else arguments}
    return {name: value for name, value in call.items() if value is not None} | {"function": function}


def _says_something(message: Message) -> bool:
    if message["role"] == "tool" or message["content"].strip():
        return True
    return any(message.get(name) for name in ("tool_calls", "reasoning_content", "thinking"))


def _from_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{place} is not JSON: {_short(text)}") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
