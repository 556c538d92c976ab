"""Where, in the text a chat template writes, each assistant turn's own words stand.

Nothing is searched for by its looks. A turn begins where the template, asked for the turns before it and a generation
prompt, stops: that is what the model sees when it has to answer. It ends with the control token that the template
writes after the words. Where a template writes earlier turns differently once later ones are there (Qwen 3 drops old
thinking, Mistral moves the tools), refuses part of a conversation, or has no generation prompt, the turn is found by
difference: the conversation is written again with that one turn replaced by a private-use character.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from parley.data.conversation import Message
from parley.errors import DataError, one_line

Span = tuple[int, int]
"""Characters [start, end) of the rendered text."""

_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError)  # a template is a program run on the user's data
_SPACE = re.compile(r"\s*")
_REPLACED = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")


class Transcript:
    """A conversation as the template writes it.

    text: the whole of it, without a generation prompt. `control` finds the tokenizer's control tokens.
    Raises DataError where the template refuses the conversation.
    """

    def __init__(
        self, tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None, control: re.Pattern[str]
    ) -> None:
        self.tokenizer, self.messages, self.tools, self.control = tokenizer, messages, tools, control
        self.text = write(tokenizer, messages, tools)

    @cached_property
    def probe(self) -> str:
        """A private-use character that the conversation does not have."""
        return next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in self.text)

    def span(self, index: int) -> Span | None:
        """What turn `index` teaches: its words, tool calls and thinking as written, with its end-of-turn token.

        None where nothing was written of it. Raises DataError where it cannot be told from its surroundings.
        """
        asked = self._write(self.messages[:index], prompt=True)
        if asked is not None and self.text.startswith(asked):
            end = self._end_of_plain_turn(index, len(asked))
            if end is not None:
                return len(asked), end
        return self._span_by_difference(index, self._start(index, asked))

    def _end_of_plain_turn(self, index: int, start: int) -> int | None:
        """The end of a turn that reads just as its message does; white space apart, which templates trim and add."""
        message = self.messages[index]
        words = message.get("content")
        if message.get("tool_calls") or not isinstance(words, str) or not words.strip() or self.control.search(words):
            return None
        start = _skip_space(self.text, start)
        if not self.text.startswith(words.strip(), start):
            return None
        closing = self.control.match(self.text, _skip_space(self.text, start + len(words.strip())))
        return closing.end() if closing else None

    def _start(self, index: int, asked: str | None) -> int | None:
        """Where the model takes over in turn `index`, given the text `asked` of it. None where that is not a prefix."""
        before = self._write(self.messages[:index])
        if asked is None:
            return None
        if asked == before:  # no generation prompt: the header, if any, comes with the turn
            head, _ = self._around_probe(index)
            if head is None:
                return None
            asked = before if head.startswith(before) and not head[len(before) :].strip() else head
        return len(asked) if self.text.startswith(asked) else None

    def _span_by_difference(self, index: int, start: int | None) -> Span | None:
        whole, changed = self._changed(index)
        first, last = changed
        if not self.text[first:last].strip():
            return None
        end = self._end(index, changed, whole)
        if start is None:
            start = self._start_in_shorter(index, end)
        if start is None and whole:
            start = self._start_before(first)
        if start is None or not start < end:
            raise self._lost(index)
        return start, end

    def _changed(self, index: int) -> tuple[bool, Span]:
        """The characters that go with turn `index`: of the whole turn (True), or of its tool calls alone (False)."""
        message = self.messages[index]
        for whole, other in ((True, self._plain(message)), (False, _with_calls_replaced(message, self.probe))):
            text = self._write([*self.messages[:index], other, *self.messages[index + 1 :]])
            if text is not None:
                first = _shared(self.text, text)
                last = len(self.text) - _shared(self.text[::-1], text[::-1])
                return whole, (first, max(first, last))
        raise self._lost(index)

    def _end(self, index: int, changed: Span, whole: bool) -> int:
        first, last = changed
        for closing in self.control.finditer(self.text, first):
            if closing.end() > last:
                if whole and self.text[last : closing.start()].strip():
                    break
                return closing.end()
        # No control token ends the turn. What the template writes after any turn may still be there as plain text.
        _, tail = self._around_probe(index)
        return last + len(tail) if tail and self.text.startswith(tail, last) else last

    def _start_before(self, first: int) -> int:
        """`first`, moved back to the end of this turn's generation prompt where only the turn's own text is between."""
        asked = self._write(self.messages, prompt=True) or ""
        prompt = asked[_shared(self.text, asked) :]
        if not prompt.strip():
            return first
        start = self.text.rfind(prompt, 0, first) + len(prompt)
        between = self.text[start:first]
        known = self.control.search(prompt) is not None or not between.strip()
        own = start >= len(prompt) and known and not self.control.search(between)
        return start if own else first

    def _start_in_shorter(self, index: int, end: int) -> int | None:
        """The start of a turn that reads as it does when the conversation stops there. None where it does not."""
        if index + 1 == len(self.messages):
            return None
        try:
            shorter = Transcript(self.tokenizer, self.messages[: index + 1], self.tools, self.control)
            span = shorter.span(index)
        except DataError:
            return None
        if span is None or not self.text.endswith(shorter.text[slice(*span)], 0, end):
            return None
        return end - (span[1] - span[0])

    def _around_probe(self, index: int) -> tuple[str | None, str]:
        """What the template writes before and, white space at its end apart, after a plain last turn `index`."""
        text = self._write([*self.messages[:index], self._plain(self.messages[index])])
        if text is None or self.probe not in text:
            return None, ""
        head, _, tail = text.partition(self.probe)
        return head, tail.rstrip()

    def _plain(self, message: Message) -> Message:
        kept = {key: value for key, value in message.items() if key not in _REPLACED}
        return kept | {"content": self.probe}

    def _write(self, messages: list[Message], prompt: bool = False) -> str | None:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, add_generation_prompt=prompt, tokenize=False
            )
        except _TEMPLATE_FAULTS:
            return None

    def _lost(self, index: int) -> DataError:
        return DataError(
            f"the chat template writes turn {index + 1} in a way that cannot be told from what stands around it; "
            "leave the row out or set model.chat_template"
        )


def write(tokenizer: Any, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
    """The template's text. Raises DataError in one line where the template refuses the conversation."""
    if not messages:
        raise DataError("got a conversation without messages, wanted at least one")
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except _TEMPLATE_FAULTS as error:
        reason = one_line(error)
        raise DataError(f"the chat template refuses this conversation: {reason}") from None


def _with_calls_replaced(message: Message, probe: str) -> Message:
    calls = [
        {**call, "function": {**call["function"], "name": probe, "arguments": {probe: probe}}}
        for call in message.get("tool_calls") or []
    ]
    return {**message, "tool_calls": calls}


def _skip_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    assert space is not None
    return space.end()


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    lengths = range(min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length]) - 1
