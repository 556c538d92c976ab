"""Tool calls and tool descriptions as data sets write them, to the form that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from parley.data.example import Arguments
from parley.data.values import RepeatedKeyError, short, text_of, type_name
from parley.data.written_numbers import parse_written
from parley.errors import DataError


def parse_tools(value: Any, origin: str) -> list[dict[str, Any]] | None:
    """The tools offered to the model, from a list of descriptions or such a list as JSON text; None for none."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"{origin}: field 'tools'")
    value = [value] if isinstance(value, dict) and value else value
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{origin}: field 'tools' is {type_name(value)}, wanted a list of tool descriptions")
    for tool in value:
        if not tool.keys() & {"function", "name", "type"}:
            keys = short(", ".join(map(str, tool)), quoted=False) or "none"
            raise DataError(
                f"{origin}: field 'tools' holds an object with keys {keys}, wanted a description with a name"
            )
    return value


def parse_tool_calls(turn: dict[str, Any], location: str) -> list[dict[str, Any]]:
    """Take `tool_calls`, or OpenAI's older `function_call`, out of `turn`."""
    calls, single = turn.pop("tool_calls", None), turn.pop("function_call", None)
    if isinstance(calls, str) and calls.strip():
        calls = parse_json(calls, f"{location}: 'tool_calls'", parse_written)
    if not calls:
        calls = [single] if single else []
    if not isinstance(calls, list):
        raise DataError(f"{location}: 'tool_calls' is {type_name(calls)}, wanted a list of calls")
    return [tool_call(call, f"{location}: 'tool_calls'") for call in calls]


def tool_call(call: Any, location: str) -> dict[str, Any]:
    """A call as templates take it: the function under `function`, its arguments as an object, numbers as written."""
    if not isinstance(call, dict):
        raise DataError(f"{location} holds {type_name(call)}, wanted an object with name and arguments")
    function = call.get("function")
    if function is None:  # written flat; Anthropic calls the arguments `input`
        function = {key: value for key, value in call.items() if key not in ("type", "id", "input")}
        if "arguments" not in function and "input" in call:
            function["arguments"] = call["input"]
        call = {key: call[key] for key in ("id",) if call.get(key) is not None} | {"type": "function"}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{location} holds a call without a name; wanted name and arguments")
    text_of(function["name"], f"{location}: the name of a call")
    arguments = _arguments(function.get("arguments"), f"{location} of {short(function['name'], quoted=False)}")
    return {name: value for name, value in call.items() if value is not None} | {
        "function": function | {"arguments": arguments}
    }


def _arguments(value: Any, location: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    arguments = parse_json(value, location, parse_written) if isinstance(value, str) else value
    if isinstance(arguments, str):  # JSON text of JSON text
        value, arguments = arguments, parse_json(arguments, location, parse_written)
    if arguments is None:
        return {}
    # Templates leave out what they do not know: Gemma 4's writes no list.
    if not isinstance(arguments, dict):
        raise DataError(f"{location}: the arguments are {type_name(arguments)}, wanted an object of names and values")
    return Arguments(arguments, value) if isinstance(value, str) else arguments


def parse_json(text: str, location: str, loads: Callable[[str], Any] = json.loads) -> Any:
    """JSON text of a field. Raises DataError for text that is not JSON."""
    try:
        return loads(text_of(text, location))
    except RepeatedKeyError as error:
        raise DataError(f"{location}: {error}") from None
    except (ValueError, RecursionError):
        # str() of a list, as pandas' to_csv writes a column of them.
        hint = "; Python wrote it, not JSON: save the rows as .jsonl or .parquet" if _PYTHON.match(text) else ""
        raise DataError(f"{location} is not JSON: {short(text)}{hint}") from None


_PYTHON = re.compile(r"\s*\[?\s*\{'")
