"""Tool calls in an answer's text, in the JSON form that Llama 3 writes: {"name": ..., "parameters": {...}}.

The form is that of Meta's "Llama 3.1: JSON based tool calling" (llama.com/docs/model-cards-and-prompt-formats); several
calls are written one after the other with ";" between them.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

_DECODER = json.JSONDecoder()


def may_be_call(text: str) -> bool:
    """Whether an answer that begins with `text` may still turn out to be calls."""
    begun = text.lstrip()
    return not begun or begun.startswith("{")


def tool_calls(text: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The calls that `text` consists of, as OpenAI writes them; None where it is anything else.

    Names must be those of `tools`, so that JSON that was asked for in words stays an answer.
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
