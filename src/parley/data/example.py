"""Example, the form into which every data set is converted before it is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""`role` and `content` (text), and the keys that templates read besides: `tool_calls`, `name`, REASONING_KEYS.

A message may also carry the loss keys below, which are for the renderer and not for the template.
"""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where a message may hold its reasoning, as text; templates differ in which one they read."""

WEIGHT = "weight"
"""Loss weight of the message's tokens, from 0 (not supervised) to 1. Without it, `data.train_on` decides."""
WEIGHT_SPANS = "weight_spans"
"""Loss weights of parts of `content`: a list of [start, end, weight], in characters, sorted, without overlap.
Characters outside all spans have the message's own weight."""
LOSS_KEYS = (WEIGHT, WEIGHT_SPANS)


class Arguments(dict[str, Any]):
    """Arguments of a tool call as an object, with the JSON `text` the row had them in, where it had text.

    Templates take the object, whose numbers keep their text (parley.data.written_numbers). Those that take none
    (DeepSeek-V3's, functionary's) take `text`.
    """

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


@dataclass(frozen=True)
class Example:
    """One row of a data set: exactly one of `messages`, `prompt` with `completion`, `text`, or `input_ids`.

    `origin` names the row to its owner ("rows.jsonl line 12", "row 12"). Prompt and completion are both text or both
    messages; the prompt is never supervised, whatever the roles in it. `tools` go with messages. `input_ids` are a
    pre-tokenised row, with `labels` of the same length (IGNORE_INDEX where not supervised). `template` are
    settings of the chat template for this row alone.
    """

    origin: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    text: str | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    template: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        forms = [value is not None for value in (self.messages, self.prompt, self.text, self.input_ids)]
        assert sum(forms) == 1, "an example is messages, a prompt with its completion, text or token ids"
        assert isinstance(self.prompt, str) == isinstance(self.completion, str)
        assert isinstance(self.prompt, list) == isinstance(self.completion, list)
        assert (self.input_ids is None) == (self.labels is None)
