"""Which spans of a rendered conversation are supervised: by role and position, loss weight and end-of-turn policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from parley.data.assistant_spans import RenderedConversation, Span, Turn
from parley.data.example import WEIGHT, WEIGHT_SPANS, Message
from parley.data.text_regions import WeightedSpan
from parley.data.traced_text import UNKNOWN
from parley.errors import DataError

TrainOn = Literal["all", "last", "inputs", "nothing"] | list[str]
EndTokens = Literal["turn", "last", "all", "none"]
ControlText = Literal["auto", "text", "tokens"]


@dataclass(frozen=True)
class RenderOptions:
    """How rows are rendered; config.DataSection has the same fields and says what they mean.

    train_on: "all" assistant turns, the "last" one, "inputs" (every token), "nothing", or a list of roles. A message's
        loss weight wins over it.
    end_tokens: end-of-turn tokens of each supervised "turn", of the "last" one alone, of "all" assistant turns, "none".
    control_tokens: control-token text inside a row is encoded as plain "text" or as "tokens"; "auto" takes it as plain
        text in messages, and as tokens in rows of text, which are written in the model's format already.
    """

    train_on: TrainOn = "all"
    end_tokens: EndTokens = "turn"
    control_tokens: ControlText = "auto"


@dataclass(frozen=True)
class Supervision:
    """Supervised spans of a text in order; `excluded` ones are not supervised, whatever token reaches into them."""

    spans: list[Span]
    excluded: list[Span]
    weighted: list[WeightedSpan]
    """Loss weights of supervised text that is not within these alone is 1; later ones override earlier ones."""
    closed: bool
    """False where no supervised turn has an end of turn."""


def supervise(
    conversation: RenderedConversation, messages: Sequence[Message], options: RenderOptions, first: int = 0
) -> Supervision:
    """What is supervised of a conversation from message `first` on. `messages` carry the loss keys."""
    chosen = _chosen(messages, options.train_on, first)
    turns = [_Supervised.of(conversation, messages, index, index in chosen) for index in range(first, len(messages))]
    weighted = [span for turn in turns for span in turn.weighted]
    if options.train_on == "inputs":
        own = [start for index in range(first, len(messages)) for start, _ in conversation.regions[index][:1]]
        spans = [(min(own, default=0) if first else 0, len(conversation.text))]
        excluded = [span for turn in turns for span in (turn.turn.spans if turn.silenced else turn.excluded)]
        return Supervision(spans, excluded, weighted, closed=True)
    last = max((number for number, turn in enumerate(turns) if turn.spans), default=None)
    spans, excluded = [], []
    for number, turn in enumerate(turns):
        spans += turn.with_end_tokens(options.end_tokens, number == last)
        excluded += turn.excluded
    supervised = [turn for turn in turns if turn.spans and turn.role == "assistant"]
    closed = not supervised or any(turn.turn.closed for turn in supervised)
    return Supervision(sorted(spans), excluded, weighted, closed)


def _chosen(messages: Sequence[Message], train_on: TrainOn, first: int) -> set[int]:
    """The messages that are supervised where they have no weight of their own."""
    if train_on == "inputs":
        return set(range(first, len(messages)))
    roles = train_on if isinstance(train_on, list) else [] if train_on == "nothing" else ["assistant"]
    indices = [index for index in range(first, len(messages)) if messages[index]["role"] in roles]
    return set(indices[-1:] if train_on == "last" else indices)


@dataclass(frozen=True)
class _Supervised:
    """A turn with what is supervised of it; `silenced` by a weight of 0 that holds for all of it."""

    role: str
    turn: Turn
    spans: list[Span]
    excluded: list[Span]
    weighted: list[WeightedSpan]
    silenced: bool

    @classmethod
    def of(
        cls, conversation: RenderedConversation, messages: Sequence[Message], index: int, chosen: bool
    ) -> _Supervised:
        message = messages[index]
        weight, pieces = message.get(WEIGHT), message.get(WEIGHT_SPANS) or []
        supervised = chosen if weight is None else bool(weight)
        assistant = message["role"] == "assistant"
        # `conversation.turn` may render the conversation again, so it is skipped where the spans are not needed.
        # Assistant turns need them for `end_tokens: all`, weighted turns to be excluded.
        if not (supervised or pieces or weight is not None or assistant):
            return cls(message["role"], Turn([], None, False), [], [], [], False)
        turn = conversation.turn(index)
        parts = [(*span, value) for s, e, value in pieces for span in _spans_in_text(conversation, index, s, e)]
        included = [(start, end) for start, end, value in parts if value]
        excluded = [(start, end) for start, end, value in parts if not value]
        # The message's weight also covers its end of turn; the weights of its parts come after it and override it.
        whole = [(*span, weight) for span in turn.spans] if weight else []
        weighted = [(*span, value) for *span, value in [*whole, *parts] if value]
        if all(value == 1 for *_, value in weighted):
            weighted = []
        silenced = weight == 0 and not included
        return cls(message["role"], turn, turn.spans if supervised else included, excluded, weighted, silenced)

    def with_end_tokens(self, policy: EndTokens, last: bool) -> Iterator[Span]:
        end = self.turn.end_token
        if not self.spans:
            # A turn without supervised content still teaches where a turn ends.
            if policy == "all" and end is not None and self.role == "assistant":
                yield end
            return
        kept = end is None or policy in ("turn", "all") or (policy == "last" and last)
        for start, stop in self.spans:
            if kept or end is None or not start <= end[0] < stop:
                yield start, stop
            elif start < end[0]:
                yield start, end[0]


def _spans_in_text(conversation: RenderedConversation, index: int, start: int, end: int) -> Iterator[Span]:
    """The spans of the text that hold characters [start, end) of a message's content."""
    for (first, last), source, begin in conversation.content_runs[index]:
        if source.field != "content":
            continue
        # Without offsets into the content the span would be a guess, and the wrong tokens could be supervised.
        if begin == UNKNOWN:
            raise DataError(
                f"the chat template rewrites the content of turn {index + 1}, so its spans cannot be followed; give "
                "the whole turn a weight"
            )
        low, high = max(first, first + start - begin), min(last, first + end - begin)
        if low < high:
            yield low, high
