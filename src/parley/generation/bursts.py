"""Steps without a look from the host, and what they drew.

Shape suffixes: B rows, N tokens between host looks, A alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from parley.generation.cache import Cache
from parley.generation.forward import Model, step
from parley.generation.sampling import Needs, advance, next_tokens, report_logprobs
from parley.generation.slots import Token
from parley.generation.state import DRAWN, LIVE, Row, State


class Burst:
    """What some steps drew for `rows`, on its way to the host."""

    def __init__(self, rows: list[Row], needs: Needs, state: State) -> None:
        self.rows, self.needs, self.state = rows, needs, state

    def read(self) -> Mapping[int, list[Token]]:
        """The new tokens of each slot, which was not released meanwhile; takes note of answers that are over."""
        state = self.state.first(len(self.rows))
        drawn_B, live_B = state.whole(DRAWN).tolist(), state.whole(LIVE).tolist()
        reports = _Reports(state, self.needs)
        told: dict[int, list[Token]] = {}
        for index, (row, drawn, live) in enumerate(zip(self.rows, drawn_B, live_B, strict=True)):
            if row.over:
                continue
            told[row.slot] = [reports.token(index, place, row) for place in range(row.drawn, drawn)]
            row.drawn, row.over = drawn, not live
        return told


class _Reports:
    def __init__(self, state: State, needs: Needs) -> None:
        self.token_BN = state.token_BN.tolist()
        self.logprob_BN: list[Any] = state.logprob_BN.tolist() if needs.logprobs else []
        self.top_BNA: list[Any] = state.top_BNA.tolist() if needs.logprobs else []
        self.top_logprob_BNA: list[Any] = state.top_logprob_BNA.tolist() if needs.logprobs else []

    def token(self, row: int, place: int, of: Row) -> Token:
        column = place % len(self.token_BN[row])
        wanted = of.asked.logprobs
        if wanted is None:
            return Token(self.token_BN[row][column])
        top = zip(self.top_BNA[row][column][:wanted], self.top_logprob_BNA[row][column][:wanted], strict=True)
        return Token(self.token_BN[row][column], self.logprob_BN[row][column], tuple(top))


class Eager:
    """Steps one by one, in plain PyTorch: what runs on a CPU, and what graphs are held against."""

    tokens = 1
    ahead = 0

    def __init__(self, model: Model, cache: Cache, state: State) -> None:
        self.model, self.cache, self.state = model, cache, state

    def launch(self, rows: list[Row], needs: Needs, tokens: int) -> Burst:
        state = self.state.first(len(rows))
        longest = max(row.position for row in rows) + 1
        logits_BV = step(self.model, self.cache, state, longest)
        draw_and_advance(logits_BV, state, needs)
        return Burst(rows, needs, state)


def draw_and_advance(logits_BV: Tensor, state: State, needs: Needs) -> None:
    token_B = next_tokens(logits_BV, state, needs)
    if needs.logprobs:
        report_logprobs(logits_BV, token_B, state)
    advance(token_B, state, needs)
