"""Held-out questions: about facts that no training row mentions."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from demo_data.conversations import KINDS, Message, different, sample_exchanges, single_turn, two_turns
from demo_data.exchange import Exchange
from parley.evaluation.demo_scoring import Question


def heldout_questions(n: int = 100, seed: int = 0) -> list[Question]:
    """`n` questions, the kinds in turn, about facts that neither the plain nor the pirate rows are about."""
    return [
        Question(exchange.kind, messages, exchange.answer, exchange.check)
        for exchange, messages in heldout_exchanges(n, seed)
    ]


def heldout_exchanges(n: int, seed: int) -> Iterator[tuple[Exchange, list[Message]]]:
    """Each exchange with its messages up to the question.

    About every fifth exchange with a context takes two turns: the context first, then the question.
    """
    rng = Random(f"questions {seed}")
    for exchange in different(sample_exchanges(rng, KINDS, held_out=True, in_turn=True), n):
        in_two = bool(exchange.context) and rng.random() < 0.2
        yield exchange, (two_turns if in_two else single_turn)(exchange)[:-1]
