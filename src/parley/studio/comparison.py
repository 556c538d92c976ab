"""What is compared with what, and questions whose answers are shown without saying whose they are."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from parley.errors import UsageError
from parley.studio.answering import Side
from parley.studio.answers import Asked

Vote = Literal["A", "B", "none"]
MOST = 50  # questions that are remembered, as in answers


@dataclass
class Shown:
    """A question as a page shows it: `order[place]` is the side that is shown at `place`, 0 for A and 1 for B.

    While `blind`, no page says which side is where.
    """

    asked: Asked
    titles: tuple[str, ...]
    order: tuple[int, ...]
    blind: bool
    vote: Vote | None = None

    @property
    def hidden(self) -> bool:
        return self.blind and self.vote is None

    def title(self, place: int) -> str:
        return "AB"[place] if self.hidden else self.titles[self.order[place]]

    def text(self, place: int) -> str:
        return self.asked.text(self.order[place])

    def place_of(self, side: int) -> int:
        return self.order.index(side)


class Shelf:
    """The questions of one studio by their id."""

    def __init__(self) -> None:
        self._shown: OrderedDict[int, Shown] = OrderedDict()

    def add(self, asked: Asked, titles: tuple[str, ...], *, blind: bool) -> Shown:
        """`blind`: in an order that nobody knows."""
        order = tuple(range(len(asked.question.sides)))
        if blind and secrets.randbelow(2):
            order = order[::-1]
        shown = self._shown[asked.question.id] = Shown(asked, titles, order, blind)
        while len(self._shown) > MOST:
            self._shown.popitem(last=False)
        return shown

    def get(self, question: int) -> Shown:
        """Raises UsageError for one that is not kept any more."""
        if question not in self._shown:
            raise UsageError("that question is not kept any more; ask it again")
        return self._shown[question]


def sides_of(first: str, second: str) -> tuple[Side, Side]:
    """The two sides: the base of `first` where `second` is empty, else `second`; then `first`."""
    return (Side(second) if second else Side(first, base=True)), Side(first)


def pair(shown: Shown, vote: Vote) -> tuple[str, str]:
    """The chosen and the rejected answer. Raises UsageError before both answers are complete."""
    if not shown.asked.finished or shown.asked.failed:
        raise UsageError("a vote needs two complete answers")
    chosen = 0 if vote == "A" else 1
    return shown.text(chosen), shown.text(1 - chosen)
