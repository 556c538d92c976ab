"""Which characters of a rendered conversation each message wrote.

Rendering with origins (parley.data.template) gives, for every character, the message it was written for.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

from parley.data.example import REASONING_KEYS, Message
from parley.data.template import RenderedText
from parley.data.traced_text import TEMPLATE, Source

Span = tuple[int, int]
WeightedSpan = tuple[int, int, float]
"""Start, end and loss weight."""
"""Characters [start, end) of the rendered text."""

_NOT_GENERATED = {"role", "name", "id", "tool_call_id", "tool_responses"}
"""Fields of a message that the model does not produce when it writes that message."""


class TextRegions:
    """The text of a conversation, the `regions` of it that each message wrote, and where its fields are in them.

    content_runs: what a message says, in order: its spans, their source, and where they begin in it.
    written: the fields that occur in the text, by message.
    """

    def __init__(
        self,
        rendered: RenderedText,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        control: re.Pattern[str],
    ) -> None:
        self.text, self.messages, self.tools, self.control = rendered.text, messages, tools, control
        self._read_runs(rendered)

    def _read_runs(self, rendered: RenderedText) -> None:
        """The regions of each message, and the spans of what it says."""
        self.starts = list(accumulate((run[0] for run in rendered.runs), initial=0))[:-1]
        self.sources = [run[1] for run in rendered.runs]
        self.regions: dict[int, list[Span]] = defaultdict(list)
        self.content_runs: dict[int, list[tuple[Span, Source, int]]] = defaultdict(list)
        self.written: set[tuple[int, str]] = set()
        current = self._messages_of_runs(rendered)
        for start, at, (length, source, source_start, _) in zip(self.starts, current, rendered.runs, strict=True):
            end = start + length
            owner = self._owner(source, at)
            regions = self.regions[owner]
            if regions and regions[-1][1] == start:
                regions[-1] = regions[-1][0], end
            else:
                regions.append((start, end))
            if source is None:
                continue
            # White space does not show that a field was written: templates strip it and add their own.
            if not self.text[start:end].strip():
                continue
            self.written.add((source.message, source.field))
            if owner == source.message != TEMPLATE and source.field not in _NOT_GENERATED:
                self.content_runs[owner].append(((start, end), source, source_start))

    def _messages_of_runs(self, rendered: RenderedText) -> list[int]:
        """For each run the message that the template was at.

        Some templates write the last turn after their loop over the messages: text between the loops that has the
        content of one assistant turn, and no other turn's, is that turn's.
        """
        current: list[int] = []
        for outside, group in groupby(rendered.runs, key=lambda run: run[3] in (None, TEMPLATE)):
            runs = list(group)
            if not outside:
                current += [run[3] or 0 for run in runs]
                continue
            authors = {run[1].message for run in runs if run[1] is not None}
            only = authors.pop() if len(authors) == 1 else TEMPLATE
            own = only != TEMPLATE and self.messages[only]["role"] == "assistant"
            current += [only if own else TEMPLATE] * len(runs)
        return current

    def _owner(self, source: Source | None, at: int) -> int:
        """The index of the message that characters belong to, written while the template was at message `at`."""
        if source is None:
            return at
        if source.field == "tool_responses":  # results in the message of their call
            return TEMPLATE
        from_assistant = source.message != TEMPLATE and self.messages[source.message]["role"] == "assistant"
        if from_assistant and at != TEMPLATE and self.messages[at]["role"] != "assistant":
            return at  # a tool's result that repeats the name of its call
        return source.message

    def _run_at(self, character: int) -> int:
        return bisect_right(self.starts, character) - 1

    def _is_content(self, character: int) -> bool:
        """Whether a character comes from a message's field; false at the end of the text."""
        return character < len(self.text) and self.sources[self._run_at(character)] is not None

    def control_tokens_in_content(self) -> list[Span]:
        """Control tokens that lie, in part at least, in the content of a message: they are text, not control."""
        found = []
        for token in self.control.finditer(self.text):
            runs = range(self._run_at(token.start()), self._run_at(token.end() - 1) + 1)
            if any(self.sources[run] is not None for run in runs):
                found.append(token.span())
        return found

    def unwritten(self) -> list[str]:
        """What the conversation holds and the template never writes: content, tool calls, their results,
        tools, the reasoning of the last turn."""
        missing = []
        if self.tools and (TEMPLATE, "tools") not in self.written:
            missing.append("tools")
        for index, message in enumerate(self.messages):
            if message.get("tool_calls") and (index, "tool_calls") not in self.written:
                missing.append("tool calls")
            if self._lost(index, "content"):
                missing.append("tool results" if message["role"] == "tool" else f"what the {message['role']} says")
        last = len(self.messages) - 1
        reasoning = [name for name in REASONING_KEYS if self.messages[last].get(name)]
        if reasoning and all(self._lost(last, name) for name in reasoning):
            missing.append("reasoning")
        return list(dict.fromkeys(missing))

    def _lost(self, index: int, field: str) -> bool:
        value = self.messages[index].get(field)
        if not isinstance(value, str) or not value.strip() or (index, field) in self.written:
            return False
        return value.strip() not in self.text
