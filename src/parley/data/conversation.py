"""The one form every data set is brought into before it is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` and `content`, and what templates know besides: `tool_calls`, `name`, `reasoning_content`."""


@dataclass(frozen=True)
class Example:
    """One row of a data set: exactly one of `messages`, `prompt` with `completion`, or `text`.

    `origin` names the row to its owner ("rows.jsonl line 12", "row 12"). Prompt and completion are both text or both
    messages; what stands in the prompt is never learned, whoever says it. `tools` go with messages.
    """

    origin: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        forms = [self.messages is not None, self.prompt is not None, self.text is not None]
        assert sum(forms) == 1, "an example is messages, a prompt with its completion, or text"
        assert isinstance(self.prompt, str) == isinstance(self.completion, str)
        assert isinstance(self.prompt, list) == isinstance(self.completion, list)
