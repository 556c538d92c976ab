"""The parts of a turn's content: text, reasoning, tool calls and tool results.

[{"type": "thinking", "thinking": "..."}, {"type": "text", "text": "..."}, {"type": "tool_call", "name": ...}]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parley.data.example import REASONING_KEYS, Message
from parley.data.loss_weights import part_weight, spans_of_parts
from parley.data.tool_calls import tool_call
from parley.data.values import short, text_of, type_name
from parley.errors import DataError

_TEXT = ("text", "value", "content")
_REASONING = ("thinking", "reasoning", "text", "content", "summary")


@dataclass
class Parts:
    """Parts of one content, sorted by what they are. `texts` have their loss weights, None for no flag."""

    texts: list[tuple[str, float | None]] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)

    @classmethod
    def of(cls, content: list[Any], location: str) -> Parts:
        """Raises DataError for a part that is not text and cannot be trained on, such as a picture."""
        parts = cls()
        for part in content:
            parts._add({"text": part} if isinstance(part, str) else part, location)
        return parts

    def _add(self, part: Any, location: str) -> None:
        if not isinstance(part, dict):
            raise DataError(f"{location} has a part that is {type_name(part)}, wanted an object with type and text")
        # A part without a type is text; some SDKs write tool-call for tool_call.
        match str(part.get("type", "text")).replace("-", "_"):
            case "text" | "input_text" | "output_text":
                self.texts.append((part_text(part, _TEXT, location), part_weight(part, location)))
            case "thinking" | "reasoning":
                self.reasoning.append(part_text(part, _REASONING, location))
            case "tool_call" | "tool_use" | "function_call" | "function":
                self.calls.append(tool_call(part, location))
            case "tool_result":
                self.results.append(_tool_result(part, location))
            case kind:
                raise DataError(f"{location} has a part {short(kind)}; Parley trains on text alone: remove it")

    def put_into(self, message: Message) -> None:
        # Joined without a separator: spans_of_parts computes character offsets on that assumption.
        message["content"] = "".join(text for text, _ in self.texts)
        message |= spans_of_parts(self.texts)
        if self.reasoning:
            # Under one key: the renderer gives it to templates under the names that they read.
            message[REASONING_KEYS[0]] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls


def part_text(part: dict[str, Any], names: tuple[str, ...], location: str) -> str:
    name = next((name for name in names if part.get(name) is not None), None)
    if name is None:
        found = ", ".join(str(key) for key in part if key != "type") or "nothing else"
        raise DataError(
            f"{location} has a part without text: it has {short(found, quoted=False)}; wanted type and text"
        )
    return text_of(part[name], f"{location}: {name!r} of a part")


def reasoning_text(value: Any, location: str) -> str:
    """Reasoning as text, from text, a list of texts or a list of parts."""
    if not isinstance(value, list):
        return text_of(value, location)
    return "".join(
        part_text(part, _REASONING, location) if isinstance(part, dict) else text_of(part, location) for part in value
    )


def _tool_result(part: dict[str, Any], location: str) -> Message:
    """A tool's result as Anthropic writes it, a part of the user's turn."""
    content = part.get("content")
    message: Message = {"role": "tool", "content": ""}
    if isinstance(content, list):
        message["content"] = "".join(text for text, _ in Parts.of(content, location).texts)
    else:
        message["content"] = text_of(content, f"{location}: a tool's result")
    # Templates that match a result to its call read `tool_call_id`.
    if isinstance(part.get("tool_use_id"), str):
        message["tool_call_id"] = part["tool_use_id"]
    return message
