"""Which characters of a rendered conversation each message wrote, and which of them a model should produce itself.

Rendering with origins (parley.data.template) gives, for every character, the message it was written for. An assistant
turn starts where its generation prompt ends, since that is what the model is given when it has to answer, and ends with
the last control token that the template wrote for this message. Nothing is searched for by its looks, so repeated
texts, control tokens inside content and tool results inside a turn change nothing.

    <|start_header_id|>assistant<|end_header_id|>\\n\\nAhoy there!<|eot_id|>\\n
    generation prompt                              supervised            .
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from parley.data.conversation_text import for_template, render_text, template_of
from parley.data.example import Message
from parley.data.text_regions import Span, TextRegions
from parley.errors import DataError

# A private-use character: templates and tokenizers give it no meaning, so it comes out where it was put in.
_PROBE = "\ue000"


@dataclass(frozen=True)
class Turn:
    """The spans of a message, its end-of-turn token, and whether the template closes it in any way."""

    spans: list[Span]
    end_token: Span | None
    closed: bool


class RenderedConversation(TextRegions):
    """A conversation as its chat template writes it.

    text: the whole of it, with a generation prompt where `prompt` says so.
    Raises DataError where the template refuses the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        control: re.Pattern[str],
        prompt: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        messages = for_template(tokenizer, messages, tools)
        super().__init__(render_text(tokenizer, messages, tools, prompt), messages, tools, control)
        # Each entry costs a rendering of the conversation so far: one per kind of turn, since one per turn would make
        # the cost of a conversation quadratic in its turns.
        self._generation_prompts: dict[tuple[Any, ...], str] = {}
        self._openings: dict[tuple[Any, ...], str] = {}
        self._headers: dict[tuple[Any, ...], str] = {}
        self._closings: dict[tuple[Any, ...], str] = {}
        self._turn_separator: str | None = None

    def turn(self, index: int) -> Turn:
        """What message `index` wrote of its own, without its header and with its end of turn.

        Without spans where the template writes none of its content; with several where another message is in between.
        """
        spans: list[Span] = []
        content = [span for span, _, _ in self.content_runs[index]]
        last = 0
        for start, end in self.regions[index]:
            inside = [span for span in content if start <= span[0] < end]
            if not inside:
                continue
            last = inside[-1][1]
            if not spans:
                start = self._after_header(index, start, inside[0][0])
            spans.append((start, self._end_of_turn(index, last, end)))
        if not spans:
            if self._has_untraced_content(index):
                raise DataError(
                    f"the chat template rewrites turn {index + 1} in a way that cannot be followed; leave the row out "
                    "or set model.chat_template"
                )
            return Turn([], None, False)
        return Turn(spans, self._end_token(last, spans[-1][1]), bool(self.text[last : spans[-1][1]].strip()))

    def _end_token(self, last: int, end: int) -> Span | None:
        """The last control token of a turn whose content ends at `last`, with white space before it."""
        tokens = list(self.control.finditer(self.text, last, end))
        if not tokens:
            return None
        # The template adds this white space for the token, so `end_tokens: none` drops both.
        start = tokens[-1].start()
        while start > last and self.text[start - 1].isspace():
            start -= 1
        return start, end

    def _has_untraced_content(self, index: int) -> bool:
        """Whether the text has untraced content of a message: other content put in its place is written as well."""
        content = self.messages[index].get("content")
        if not isinstance(content, str) or not content.strip() or (index, "content") in self.written:
            return False
        if not any(content.strip() in self.text[start:end] for start, end in self.regions[index]):
            return False
        probed = {**self.messages[index], "content": _PROBE}
        replaced = self._shorter([*self.messages[:index], probed, *self.messages[index + 1 :]])
        return replaced is not None and _PROBE in replaced.text and (index, "content") not in replaced.written

    def _after_header(self, index: int, start: int, first: int) -> int:
        """Where the model takes over in a turn that starts at `start` and whose content starts at `first`."""
        written = self.text[start:first]
        if self.messages[index]["role"] != "assistant":
            return first
        prompt = self._generation_prompt(index, start, first)
        if prompt.strip():
            if self.text.endswith(prompt, 0, start) and prompt not in written:
                return start
            header = self._end_of(prompt, written)
            if header:
                return start + header
        header_text = self._header(index)
        return start + self._end_of(header_text, written) if header_text.strip() else start

    def _end_of(self, prompt: str, written: str) -> int:
        """Where `prompt`, or as much of it as there is, ends in `written`; 0 where there is none of it.

        Of a prompt that opens a block of reasoning, a turn without reasoning has the beginning alone.
        """
        tokens = [token.span() for token in self.control.finditer(prompt)]
        inside = {at for token in self.control.finditer(written) for at in range(token.start() + 1, token.end())}
        shortest = tokens[0][1] if tokens else len(prompt.rstrip())
        for length in range(len(prompt), max(shortest, 1) - 1, -1):
            if any(start < length < end for start, end in tokens):
                continue
            # The last match, next to the content; a prefix that ends inside a control token would split it.
            found = written.rfind(prompt[:length])
            if found >= 0 and found + length not in inside:
                return found + length
        return 0

    def _generation_prompt(self, index: int, start: int, first: int) -> str:
        """The generation prompt of turn `index`. Turns after the same kind of turn have the same one."""
        kind = self._kind(index)
        if kind not in self._generation_prompts:
            self._generation_prompts[kind] = self._constant_generation_prompt() or self._new_generation_prompt(
                index, start, first
            )
        return self._generation_prompts[kind]

    def _constant_generation_prompt(self) -> str:
        """The generation prompt where it depends on no message: rendered once per template, not for every row."""
        template = template_of(self.tokenizer, self.tools)
        if not template.has_constant_prompt or self.tools:
            return ""
        key = tuple(self.tokenizer.special_tokens_map.items())
        if key not in template.generation_prompts:
            question = [{"role": "user", "content": _PROBE}]
            prompted, plain = self._text(question, prompt=True) or "", self._text(question) or ""
            template.generation_prompts[key] = prompted[_common_prefix_length(prompted, plain) :]
        return template.generation_prompts[key]

    def _new_generation_prompt(self, index: int, start: int, first: int) -> str:
        before = list(self.messages[:index]) or [{"role": "user", "content": _PROBE}]
        prompted = self._text(before, prompt=True)
        if prompted is None:
            before = [{"role": "user", "content": _PROBE}]
            prompted = self._text(before, prompt=True)
        if prompted is None:
            return ""
        # The usual case: the prompt's text is a prefix of the conversation's.
        if start < len(prompted) <= first and self.text.startswith(prompted):
            return prompted[start:]
        return prompted[_common_prefix_length(prompted, self._text(before) or "") :]

    def _header(self, index: int) -> str:
        """What the template writes before the content of a plain turn `index`."""
        kind = self._kind(index)
        if kind not in self._headers:
            plain = {"role": self.messages[index]["role"], "content": _PROBE}
            shorter = self._shorter([*self.messages[:index], plain])
            content = shorter.content_runs[index] if shorter else []
            starts = (
                [start for start, end in shorter.regions[index] if end > content[0][0][0]]
                if shorter and content
                else []
            )
            self._headers[kind] = shorter.text[starts[0] : content[0][0][0]] if shorter and starts else ""
        return self._headers[kind]

    def _end_of_turn(self, index: int, last: int, end: int) -> int:
        """The end of a turn whose content ends at `last` and whose own text ends at `end`."""
        closed = last + self._closed(index, self.text[last:end])
        is_last = index + 1 == len(self.messages)
        unclosed = not self.control.search(self.text[last:closed])
        if is_last and unclosed and not self._is_content(end):
            after = self.control.match(self.text, end + _spaces(self.text[end:]))
            if after and not self._opens(index, after[0]):  # written once, after the loop over the messages
                return after.end()
        if not is_last and unclosed:
            separator = self._separator()
            if separator and self.text.startswith(separator, end):
                return end + len(separator)
        if not is_last and (unclosed or self.messages[index + 1]["role"] == "tool"):
            closing = self._closing(index)
            if len(closing) > closed - last and self.text.startswith(closing, last):
                stop = last + len(closing)
                if not any(self.sources[run] for run in range(self._run_at(last), self._run_at(stop - 1) + 1)):
                    return stop
        return closed

    def _closed(self, index: int, tail: str) -> int:
        """How much of what the template writes after the content closes the turn: up to its last control token, or all
        of it but white space at the end. A control token of the generation prompt opens another turn."""
        tokens = list(self.control.finditer(tail))
        own = list(takewhile(lambda token: not self._opens(index, token[0]), tokens))
        if own:
            return own[-1].end()
        return len((tail[: tokens[0].start()] if tokens else tail).rstrip())

    def _opens(self, index: int, token: str) -> bool:
        """Whether a control token opens turn `index`, as part of its generation prompt, rather than closes a turn."""
        kind = self._kind(index)
        if token not in self._generation_prompts.get(kind, ""):
            return False
        if kind not in self._openings:
            before = list(self.messages[:index]) or [{"role": "user", "content": _PROBE}]
            prompted, plain = self._text(before, prompt=True) or "", self._text(before) or ""
            self._openings[kind] = prompted[_common_prefix_length(prompted, plain) :]
        return token in self._openings[kind]

    def _closing(self, index: int) -> str:
        """What the template writes after the content of turn `index` while it is the last one."""
        kind = self._kind(index + 1)
        if kind not in self._closings:
            shorter = self._shorter(self.messages[: index + 1])
            spans = shorter.turn(index).spans if shorter else []
            last = shorter.content_runs[index][-1][0][1] if shorter and spans else 0
            self._closings[kind] = shorter.text[last : spans[-1][1]] if shorter and spans else ""
        return self._closings[kind]

    def _separator(self) -> str:
        """What the template writes between an answer and the header of a question, if that closes the answer: some
        templates close a turn when they come to the next one."""
        if self._turn_separator is None:
            self._turn_separator = self._new_separator()
        return self._turn_separator

    def _new_separator(self) -> str:
        roles = ("user", "assistant", "user")
        three = self._shorter([{"role": role, "content": _PROBE} for role in roles])
        if three is None or not all(three.content_runs[index] for index in range(3)):
            return ""
        spans = [three.content_runs[index][0][0] for index in range(3)]
        header = three.text[three.regions[0][0][0] : spans[0][0]]
        between = three.text[spans[1][1] : spans[2][0]]
        if not header.strip() or not between.endswith(header):
            return ""
        tokens = list(self.control.finditer(between.removesuffix(header)))
        return between[: tokens[-1].end()] if tokens else ""

    def _kind(self, index: int) -> tuple[Any, ...]:
        """Turns of one kind follow a turn of one role, with calls or without."""
        if not index:
            return ()
        before = self.messages[index - 1]
        return before["role"], bool(before.get("tool_calls"))

    def _text(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        try:
            return render_text(self.tokenizer, messages, self.tools, prompt).text
        except DataError:
            return None

    def _shorter(self, messages: Sequence[Message]) -> RenderedConversation | None:
        try:
            return RenderedConversation(self.tokenizer, messages, self.tools, self.control)
        except DataError:
            return None


def _common_prefix_length(first: str, second: str) -> int:
    """The number of characters that both begin with."""
    # Bisection compares slices in C: much faster than a loop over the characters of a long conversation.
    lengths = range(min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length]) - 1


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip())
