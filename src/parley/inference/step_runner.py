"""Steps without a look from the host, and what they drew.

Shape suffixes: B rows, N tokens between host looks, A alternatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from parley.inference.interface import Token
from parley.inference.sampling import Needs, advance, columns, next_tokens, report_logprobs
from parley.inference.slot_state import DRAWN, LIVE, Row, State

MOST_TOKENS = 8  # of a row in one burst


@dataclass(frozen=True)
class Report:
    """The parts of a State that the host reads. `ready`: recorded once they have arrived; None where they lie."""

    fields_BF: Tensor
    token_BN: Tensor
    logprob_BN: Tensor
    top_BNA: Tensor
    top_logprob_BNA: Tensor
    ready: torch.cuda.Event | None = None

    @classmethod
    def of(cls, state: State) -> Report:
        return cls(state.fields_BF, state.token_BN, state.logprob_BN, state.top_BNA, state.top_logprob_BNA)

    @classmethod
    def pinned(cls, state: State) -> Report:
        """Room on the host for `state`'s report."""
        tensors = [torch.empty_like(t, device="cpu", pin_memory=True) for t in cls.of(state)._tensors()]
        return replace(cls(*tensors), ready=torch.cuda.Event())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.fields_BF, self.token_BN, self.logprob_BN, self.top_BNA, self.top_logprob_BNA

    def send(self, state: State, needs: Needs) -> None:
        """Start copying `state`, of as many rows or fewer, into this pinned report."""
        assert self.ready is not None
        for name in (
            "fields_BF",
            "token_BN",
            *(("logprob_BN", "top_BNA", "top_logprob_BNA") if needs.logprobs else ()),
        ):
            source = vars(state)[name]
            vars(self)[name][: len(source)].copy_(source, non_blocking=True)
        self.ready.record()


class Burst:
    """What some steps drew for `rows`, on its way to the host."""

    def __init__(self, rows: list[Row], needs: Needs, report: Report) -> None:
        self.rows, self.needs, self.report = rows, needs, report

    def read(self) -> Mapping[int, list[Token]]:
        """The new tokens of each slot that was not released meanwhile; takes note of answers that are over."""
        if self.report.ready is not None:
            self.report.ready.synchronize()
        rows = len(self.rows)
        fields, token_BN = self.report.fields_BF.numpy()[:rows], self.report.token_BN.numpy()[:rows].tolist()
        drawn_B, live_B = fields[:, DRAWN].tolist(), fields[:, LIVE].tolist()
        told: dict[int, list[Token]] = {}
        for index, (row, drawn, live) in enumerate(zip(self.rows, drawn_B, live_B, strict=True)):
            if row.over:
                continue
            places = [place % len(token_BN[index]) for place in range(row.drawn, drawn)]
            if places:
                told[row.slot] = [self._token(token_BN[index][place], index, place) for place in places]
            row.drawn, row.over = drawn, not live
        return told

    def _token(self, token: int, row: int, column: int) -> Token:
        wanted = self.rows[row].asked.logprobs
        if wanted is None:
            return Token(token)
        top = self.report.top_BNA[row, column, :wanted].tolist()
        logprobs = self.report.top_logprob_BNA[row, column, :wanted].tolist()
        return Token(token, self.report.logprob_BN[row, column].item(), tuple(zip(top, logprobs, strict=True)))


class Runner(Protocol):
    """Runs steps on the device."""

    @property
    def tokens(self) -> int:
        """The most it draws for a row in one burst."""

    @property
    def ahead(self) -> int:
        """How many bursts to have under way while one is read."""

    def warm_up(self, read: Callable[[], None]) -> None:
        """Compile and capture what common steps need, and `read`, which reads a prompt. No answer is running."""

    def launch(self, rows: list[Row], needs: Needs, tokens: int) -> Burst:
        """Start up to `tokens` steps of `rows`, which are the state's first rows in order."""


class Eager:
    """Steps one by one: what runs on a CPU, and what graphs are held against.

    `step` gives the fp32 logits (B, V) that follow one token of each row. The state lies on the host.
    """

    tokens = 1
    ahead = 0

    def __init__(self, step: Callable[[State], Tensor], state: State) -> None:
        self.step = step
        self.states = [state.first(rows) for rows in range(1, len(state.fields_BF) + 1)]

    def warm_up(self, read: Callable[[], None]) -> None:
        read()

    def launch(self, rows: list[Row], needs: Needs, tokens: int) -> Burst:
        if not rows:
            return Burst(rows, needs, Report.of(self.states[0]))
        state = self.states[len(rows) - 1]
        for _ in range(tokens):
            take(self.step(state).cpu(), state, needs)
        return Burst(rows, needs, Report.of(state))


def take(logits_BV: Tensor, state: State, needs: Needs) -> None:
    """Draw each row's next token and step on. `state` lies on the host."""
    token_B = next_tokens(logits_BV, state, needs)
    if needs.logprobs:
        report_logprobs(logits_BV, token_B, columns(state), state)
    advance(token_B, state, needs)
