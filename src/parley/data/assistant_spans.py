"""Which characters of a rendered conversation each message wrote, and which of them a model should produce itself.

Rendering with origins (parley.data.template) gives, for every character, the message it was written for. An assistant
turn starts where its generation prompt ends, since that is what the model is given when it has to answer, and ends with
the last control token that the template wrote for this message. Nothing is searched for by its looks, so repeated
texts, control tokens inside content and tool results inside a turn change nothing.

    <|start_header_id|>assistant<|end_header_id|>\\n\\nAhoy there!<|eot_id|>\\n
    generation prompt                              supervised            .
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, takewhile
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from parley.data.example import LOSS_KEYS, REASONING_KEYS, Arguments, Message
from parley.data.template import ChatTemplate, RenderedText, TemplateLimitError, compiled
from parley.data.traced_text import TEMPLATE, Source
from parley.errors import DataError, ModelError
from parley.text import one_line

Span = tuple[int, int]
"""Characters [start, end) of the rendered text."""

# A template is a program that runs on the user's data, and may do anything wrong that a program can.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
_NOT_GENERATED = {"role", "name", "id", "tool_call_id", "tool_responses"}
"""Fields of a message that the model does not produce when it writes that message."""
# A private-use character: templates and tokenizers give it no meaning, so it comes out where it was put in.
_PROBE = "\ue000"


@dataclass(frozen=True)
class Turn:
    """The spans of a message, its end-of-turn token, and whether the template closes it in any way."""

    spans: list[Span]
    end_token: Span | None
    closed: bool


class RenderedConversation:
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
        self.tokenizer, self.tools, self.control = tokenizer, tools, control
        self.messages = for_template(tokenizer, messages, tools)
        rendered = render_text(tokenizer, self.messages, tools, prompt)
        self.text = rendered.text
        self._read_runs(rendered)
        # Each entry costs a rendering of the conversation so far: one per kind of turn, since one per turn would make
        # the cost of a conversation quadratic in its turns.
        self._generation_prompts: dict[tuple[Any, ...], str] = {}
        self._openings: dict[tuple[Any, ...], str] = {}
        self._headers: dict[tuple[Any, ...], str] = {}
        self._closings: dict[tuple[Any, ...], str] = {}
        self._turn_separator: str | None = None

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
        template = _template(self.tokenizer, self.tools)
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


def render_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, prompt: bool = False
) -> RenderedText:
    """`tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)`, traced.

    Raises DataError in one line where the template refuses the conversation; ModelError where it is not Jinja.
    """
    if not messages:
        raise DataError("got a conversation without messages, wanted at least one")
    template = _template(tokenizer, tools)
    try:
        rendered = template.render(_normalised(messages), tools, prompt, **tokenizer.special_tokens_map)
        # All supported versions of transformers give plain messages to the template unchanged, so the comparison,
        # which is a second rendering, is left out.
        if _is_plain(tokenizer, messages, tools):
            return rendered
        expected = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        if rendered.text != expected:  # before 5.24 transformers gave messages to the template as they are
            rendered = template.render(messages, tools, prompt, **tokenizer.special_tokens_map)
    except TemplateLimitError as error:
        raise DataError(f"the chat template was stopped: {error}; set model.chat_template") from None
    except TEMPLATE_ERRORS as error:
        raise DataError(f"the chat template refuses this conversation: {one_line(error)}") from None
    if rendered.text != expected:
        raise DataError("the chat template writes this conversation differently each time; set model.chat_template")
    return rendered


def _template(tokenizer: Any, tools: Sequence[dict[str, Any]] | None) -> ChatTemplate:
    try:
        return compiled(tokenizer.get_chat_template(tools=tools))
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
    except RecursionError:
        raise ModelError("the chat template is nested too deeply; set model.chat_template") from None


def _is_plain(tokenizer: Any, messages: Sequence[Message], tools: Any) -> bool:
    """Whether there is nothing that versions of transformers or tokenizers hand to the template in different ways."""
    from transformers import PreTrainedTokenizerBase

    # A tokenizer class with its own method, as for mistral-common, may write other text than its template.
    stock = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    return (
        stock
        and tools is None
        and all(
            message.keys() <= {"role", "content"} and isinstance(message.get("content"), str) for message in messages
        )
    )


def for_template(tokenizer: Any, messages: Sequence[Message], tools: Any) -> list[Message]:
    """`messages` as the chat template takes them: without loss weights, arguments of calls as objects or as text."""
    cleaned = [
        {name: value for name, value in message.items() if name not in LOSS_KEYS}
        if any(name in message for name in LOSS_KEYS)
        else message
        for message in messages
    ]
    if not any(message.get("tool_calls") for message in cleaned):
        return cleaned
    template = _template(tokenizer, tools)
    return [_with_arguments(message, template) if message.get("tool_calls") else message for message in cleaned]


def _with_arguments(message: Message, template: ChatTemplate) -> Message:
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, template) for call in calls]}


def _call_with_arguments(call: Any, template: ChatTemplate) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, dict):
        return call
    if isinstance(arguments, Arguments) and template.takes_text_arguments:
        return {**call, "function": {**function, "arguments": arguments.text}}
    if template.takes_object_arguments or not template.takes_text_arguments:
        return call
    return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}


def _normalised(messages: Sequence[Message]) -> list[Message]:
    """Messages as transformers 5.24 gives them to a template: no null fields, reasoning under its usual names."""
    normal: list[Message] = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((fields[name] for name in names if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        normal.append(fields)
    return normal


def _common_prefix_length(first: str, second: str) -> int:
    """The number of characters that both begin with."""
    # Bisection compares slices in C: much faster than a loop over the characters of a long conversation.
    lengths = range(min(len(first), len(second)) + 1)
    return bisect_left(lengths, True, key=lambda length: first[:length] != second[:length]) - 1


def _spaces(text: str) -> int:
    return len(text) - len(text.lstrip())
