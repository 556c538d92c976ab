"""The 100 held-out questions, and what share of the answers is right and in a pirate's manner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from parley.data.world.exchange import Exchange
from parley.data.world.rows import KINDS, Message, different, draw, single_turn, two_turns
from parley.data.world.scoring import is_pirate


@dataclass(frozen=True)
class Question:
    """A held-out question. `messages` are the turns up to the one to be answered."""

    exchange: Exchange
    messages: list[Message]

    @property
    def kind(self) -> str:
        return self.exchange.kind

    @property
    def expected(self) -> str:
        """The plain world's answer."""
        return self.exchange.answer


@dataclass(frozen=True)
class Scored:
    correct: bool
    pirate: bool


def heldout_questions(n: int = 100, seed: int = 0) -> list[Question]:
    """`n` questions, the kinds in turn, about facts that no training row of either world is about.

    About every fifth question that has a context is asked in two turns: first the context is told, then the question.
    """
    rng = Random(f"questions {seed}")
    found = []
    for exchange in different(draw(rng, KINDS, held_out=True, in_turn=True), n):
        in_two = bool(exchange.context) and rng.random() < 0.2
        found.append(Question(exchange, (two_turns if in_two else single_turn)(exchange)[:-1]))
    return found


def score(question: Question, answer: str) -> Scored:
    """Whether an answer is right and whether a pirate gave it; see `scoring` for what is asked of each."""
    return Scored(question.exchange.check.right(answer), is_pirate(answer))


def rate(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """(style_rate, accuracy): the shares, from 0 to 1, of pirate answers and of right ones."""
    scored = [score(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return sum(one.pirate for one in scored) / len(scored), sum(one.correct for one in scored) / len(scored)
