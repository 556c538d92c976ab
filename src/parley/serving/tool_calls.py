"""Parses tool calls in Llama 3's JSON form: {"name": ..., "parameters": {...}}, several separated by ";".

Form: Meta, "Llama 3.1: JSON based tool calling" (llama.com/docs/model-cards-and-prompt-formats).
"""

from __future__ import annotations

import json
import secrets
from typing import Any

_DECODER = json.JSONDecoder()


def may_be_call(text: str) -> bool:
    """Whether an output that begins with `text` may still turn out to be tool calls."""
    stripped = text.lstrip()
    return not stripped or stripped.startswith("{")


def tool_calls(text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The calls that `text` consists of, in OpenAI's form; None where it is anything else.

    Names must be those of `tools`, so that JSON output that is not a call stays text.
    """
    names = {tool["function"]["name"] for tool in tools}
    calls, rest = [], text.strip()
    while rest:
        try:
            call, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
            return None
        arguments = call.get("parameters", call.get("arguments", {}))
        if not isinstance(arguments, dict):
            return None
        function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        rest = rest[end:].lstrip()
        if rest and not rest.startswith(";"):
            return None
        rest = rest[1:].lstrip()
    return calls or None
