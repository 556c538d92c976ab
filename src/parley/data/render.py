"""Conversations to token ids and a mask of what is learned, in one pass from the tokenizer's own chat template.

The template writes the text, the text is encoded once, and the mask is drawn on the text (parley.data.turns) and
carried over by the tokens' character offsets. So ids are apply_chat_template's own, and ids and mask cannot drift.

    <|start_header_id|>assistant<|end_header_id|>\\n\\nAhoy there!<|eot_id|>
    -------------- not learned ------------------- --- learned ---------
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from parley.data.assistant_spans import RenderedConversation, Span, render_text
from parley.data.conversation import Example, Message
from parley.data.date import pin_date
from parley.data.tokens import ControlTokens, control_tokens, control_tokens_in, strings
from parley.errors import DataError, ModelError

__all__ = ["Rendered", "control_tokens_in", "pin_date", "render", "render_example", "render_many", "render_prompt"]

Tools = list[dict[str, Any]]
TrainOn = Literal["all", "last"]


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row, (T,), and which of them are learned, (T,)."""

    input_ids: list[int]
    mask: list[bool]

    def part(self, start: int, stop: int | None) -> Rendered:
        """The tokens from `start` to before `stop`."""
        return Rendered(self.input_ids[start:stop], self.mask[start:stop])


@dataclass(frozen=True)
class Script:
    """A text to encode with its learned spans; `head` is put before it unlearned, `tail` after it learned."""

    text: str
    spans: list[Span]
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)


def render(
    tokenizer: Any, messages: list[Message], *, tools: Tools | None = None, train_on: TrainOn = "all"
) -> Rendered:
    """The ids that `tokenizer.apply_chat_template(messages, tools=tools)` gives, and their mask.

    Learned are the assistant's words, calls and thinking as the template writes them, each with its end-of-turn token:
    of every turn, or with `train_on="last"` of the final one. A token that stands across the edge of the words is
    learned. A turn that the template writes no words of is not, nor are a conversation's other roles and headers.

    Raises DataError for a row the template refuses, or one with a second beginning-of-text token; ModelError for a
    tokenizer without chat template or without character offsets.
    """
    return render_example(tokenizer, Example("conversation", messages=messages, tools=tools), train_on)


def render_example(tokenizer: Any, example: Example, train_on: TrainOn = "all") -> Rendered:
    """`render` for a row of any form. Raises as `render` does; the messages leave the row's origin to the caller.

    Text is learned whole and prompt-completion rows from the completion on; both get one beginning-of-text token and
    one end-of-text token where the tokenizer has them and the text does not bring them along.
    """
    outcome = render_many(tokenizer, [example], train_on)[0]
    if isinstance(outcome, DataError):
        raise outcome
    return outcome


def render_many(tokenizer: Any, examples: Iterable[Example], train_on: TrainOn = "all") -> list[Rendered | DataError]:
    """`render_example` for many rows at once, encoded as one batch; a row's DataError stands in its place."""
    return encode(tokenizer, write_scripts(tokenizer, examples, train_on))


def write_scripts(tokenizer: Any, examples: Iterable[Example], train_on: TrainOn) -> list[Script | DataError]:
    """The first half of `render_many`: what the template writes. All of it is Python."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets; use the model's fast tokenizer (tokenizer.json)"
        )
    control = control_tokens(tokenizer)
    outcomes: list[Script | DataError] = []
    for example in examples:
        try:
            outcomes.append(_script(tokenizer, control, example, train_on))
        except DataError as error:
            outcomes.append(error)
    return outcomes


def encode(tokenizer: Any, scripts: list[Script | DataError]) -> list[Rendered | DataError]:
    """The second half: ids and masks. Most of it is the tokenizer's, which lets other threads run meanwhile."""
    rendered = iter(_encode(tokenizer, [each for each in scripts if isinstance(each, Script)]))
    return [next(rendered) if isinstance(each, Script) else each for each in scripts]


def render_prompt(tokenizer: Any, messages: list[Message], tools: Tools | None = None) -> list[int]:
    """The ids that ask the model for the next turn: `apply_chat_template(..., add_generation_prompt=True)`'s own.

    Raises as `render` does.
    """
    _check_template(tokenizer, tools)
    text = render_text(tokenizer, messages, tools, prompt=True).text
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _script(tokenizer: Any, control: ControlTokens, example: Example, train_on: TrainOn) -> Script:
    prompt, completion = example.prompt, example.completion
    if example.messages is not None:
        return _conversation(tokenizer, control, example.messages, example.tools, train_on)
    if isinstance(prompt, list):
        assert isinstance(completion, list)
        return _conversation(tokenizer, control, prompt + completion, example.tools, train_on, first=len(prompt))
    if prompt is not None:
        assert isinstance(completion, str)
        return _plain_text(tokenizer, prompt + completion, learned_from=len(prompt))
    assert example.text is not None
    return _plain_text(tokenizer, example.text)


def _conversation(
    tokenizer: Any,
    control: ControlTokens,
    messages: list[Message],
    tools: Tools | None,
    train_on: TrainOn,
    first: int = 0,
) -> Script:
    """The script of a conversation whose assistant turns are learned from message `first` on."""
    _check_template(tokenizer, tools)
    conversation = RenderedConversation(tokenizer, messages, tools, control.pattern)
    _check_beginning(tokenizer, conversation.text, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    if train_on == "last":
        turns = turns[-1:]
    spans = [span for turn in turns for span in conversation.spans(turn)]
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise DataError("the chat template writes the assistant's turns out of order; set model.chat_template")
    return Script(conversation.text, spans)


def _plain_text(tokenizer: Any, text: str, learned_from: int = 0) -> Script:
    """The script of a text learned from one character on, with the tokens for its beginning and end."""
    beginning, end = tokenizer.bos_token, tokenizer.eos_token
    begins = beginning is not None and text.startswith(beginning)
    if beginning is not None and beginning in text[len(beginning) * begins :]:
        raise _second_beginning(beginning)
    start = max(learned_from, len(beginning) if begins else 0)
    if not text[start:].strip():
        start = len(text)
    head = [] if begins or beginning is None else [tokenizer.bos_token_id]
    tail = [] if end is None or text.endswith(end) else [tokenizer.eos_token_id]
    return Script(text, [(start, len(text))] if start < len(text) else [], head, tail)


def _encode(tokenizer: Any, scripts: list[Script]) -> list[Rendered]:
    if not scripts:
        return []
    control = control_tokens(tokenizer)
    batch = tokenizer(
        [script.text for script in scripts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = []
    for script, ids, encoding in zip(scripts, batch["input_ids"], batch.encodings, strict=True):
        mask = _mask(ids, encoding.token_to_chars, script.spans, control.ids)
        learned = bool(script.spans)
        mask = [False] * len(script.head) + mask + [learned] * len(script.tail)
        rows.append(Rendered(script.head + ids + script.tail, mask))
    return rows


def _mask(ids: list[int], chars: Callable[[int], Span], spans: list[Span], special: frozenset[int]) -> list[bool]:
    """Tokens that overlap a span. A token reaches from its predecessor's end, as offsets may leave white space out.

    `chars` gives the offsets of a token; asking for the few that matter is quicker than a list of all.
    """
    mask = [False] * len(ids)
    tokens = range(len(ids))
    for start, end in spans:
        first, stop = (bisect_right(tokens, edge, key=lambda token: chars(token)[1]) for edge in (start, end))
        if stop < len(ids) and (stop == 0 or chars(stop - 1)[1] < end):
            stop += 1  # a token that stands across the end
        if first < stop and ids[first] in special and chars(first)[0] < start:
            first += 1  # a header's control token that swallows white space after it
        mask[first:stop] = [True] * (stop - first)
    return mask


def _check_template(tokenizer: Any, tools: Tools | None) -> None:
    try:
        tokenizer.get_chat_template(tools=tools)
    except ValueError:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; set model.chat_template "
            "to a Jinja file, or train on rows of text"
        ) from None


def _check_beginning(tokenizer: Any, text: str, messages: list[Message]) -> None:
    """One beginning of text. Templates that write one before every turn, as Llama 2's does, are followed."""
    beginning = tokenizer.bos_token
    if beginning is None or text.count(beginning) < 2:
        return
    if text.startswith(beginning * 2):
        raise DataError(f"the chat template writes {beginning} twice at the start; remove one from it")
    if any(beginning in said for said in strings(messages)):
        raise _second_beginning(beginning)


def _second_beginning(beginning: str) -> DataError:
    return DataError(f"got {beginning} inside the row's own text, where it would begin a second text; remove it")
