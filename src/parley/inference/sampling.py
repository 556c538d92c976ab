"""Drawing the next token of each row: repetition penalty, temperature, top_k, top_p and min_p, in this order and with
the meaning they have in transformers' logits processors; then one draw by inverse CDF.

A draw depends on the row's seed and the place in its answer alone, never on the rows beside it.

Shape suffixes: B rows, V vocabulary, N tokens between host looks, A alternatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parley.inference.interface import DecodeRequest
from parley.inference.slot_state import (
    DRAWN,
    ENDS,
    LIMIT,
    LIVE,
    MIN_P,
    PENALTY,
    POSITION,
    SEED,
    TAIL,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    State,
)


@dataclass(frozen=True)
class Needs:
    """What some row of a step asks for, so that the others' steps do not pay for it."""

    drawn: bool = False  # any temperature above zero
    penalised: bool = False
    cut: bool = False  # top_k or top_p, which sort the vocabulary
    logprobs: bool = False

    @classmethod
    def of(cls, asked: Iterable[DecodeRequest]) -> Needs:
        asked = list(asked)
        drawn = [one.settings for one in asked if one.settings.temperature > 0]
        return cls(
            bool(drawn),
            any(one.settings.repetition_penalty != 1.0 for one in asked),
            any(settings.top_k or settings.top_p < 1.0 for settings in drawn),
            any(one.logprobs is not None for one in asked),
        )


def penalise(logits_BV: Tensor, state: State) -> Tensor:
    """Tokens seen before lose: positive logits are divided by the penalty, negative ones multiplied (CTRL,
    arXiv 1909.05858)."""
    penalty_B1 = state.real(PENALTY)[:, None]
    lower_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(state.seen_BV, lower_BV, logits_BV)


def temper(logits_BV: Tensor, state: State) -> Tensor:
    """Divided by the temperature; greedy rows as they are."""
    temperature_B1 = state.real(TEMPERATURE)[:, None]
    return logits_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)


def removed(scores_BV: Tensor, state: State) -> Tensor:
    """Which tokens top_k and then top_p (arXiv 1904.09751) leave out. `scores_BV` are tempered."""
    vocabulary = scores_BV.shape[1]
    ascending_BV, token_BV = scores_BV.sort(dim=-1)
    top_k_B1 = state.whole(TOP_K)[:, None].long()
    kept_B1 = torch.where((top_k_B1 > 0) & (top_k_B1 < vocabulary), top_k_B1, vocabulary)
    least_B1 = ascending_BV.gather(1, vocabulary - kept_B1)
    ascending_BV = ascending_BV.masked_fill(ascending_BV < least_B1, -torch.inf)
    tail_B1 = state.real(TAIL)[:, None]
    in_tail_BV = (ascending_BV.softmax(-1).cumsum(-1) <= tail_B1) & (tail_B1 > 0)
    in_tail_BV[:, -1] = False
    return torch.zeros_like(in_tail_BV).scatter(1, token_BV, in_tail_BV) | (scores_BV < least_B1)


def probabilities(logits_BV: Tensor, state: State, needs: Needs) -> Tensor:
    """What each token is drawn with, zero for those left out; rows do not add up to one. `logits_BV` are penalised."""
    scores_BV = temper(logits_BV, state)
    if needs.cut:
        scores_BV = scores_BV.masked_fill(removed(scores_BV, state), -torch.inf)
    p_BV = scores_BV.softmax(-1)
    least_B1 = state.real(MIN_P)[:, None] * p_BV.amax(-1, keepdim=True)  # min_p: arXiv 2407.01082
    return p_BV.masked_fill_(p_BV < least_B1, 0.0)


def uniform(state: State) -> Tensor:
    """One number in [0, 1) a row, of 23 bits, from its seed and how many tokens it has drawn (see state.mix).

    `state` lies on the host.
    """
    fields = state.fields_BF.numpy().view(np.uint32)
    x_B = fields[:, SEED] + fields[:, DRAWN]
    x_B ^= x_B >> 16
    x_B *= np.uint32(0x7FEB352D)
    x_B ^= x_B >> 15
    x_B *= np.uint32(0x846CA68B)
    x_B ^= x_B >> 16
    return torch.from_numpy((x_B >> 9).astype(np.float32) * np.float32(2**-23))


def draw(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which the cumulated `p_BV` passes the share `u_B` of its sum."""
    cumulated_BV = p_BV.cumsum(-1)
    token_B = torch.searchsorted(cumulated_BV, u_B[:, None] * cumulated_BV[:, -1:], right=True)[:, 0]
    return token_B.clamp_(max=p_BV.shape[1] - 1)  # where logits are no numbers, an index still


def next_tokens(logits_BV: Tensor, state: State, needs: Needs) -> Tensor:
    """The token of each row: the likeliest where the temperature is zero, else drawn. `logits_BV` are fp32,
    on the host."""
    if needs.penalised:
        logits_BV = penalise(logits_BV, state)
    likeliest_B = torch.from_numpy(logits_BV.numpy().argmax(-1))  # in a tenth of the time that PyTorch takes
    if not needs.drawn:
        return likeliest_B
    drawn_B = draw(probabilities(logits_BV, state, needs), uniform(state))
    return torch.where(state.real(TEMPERATURE) > 0, drawn_B, likeliest_B)


def columns(state: State) -> Tensor:
    """Where each row's next token is reported."""
    return (state.whole(DRAWN) % state.token_BN.shape[1]).long()


def report_logprobs(logits_BV: Tensor, token_B: Tensor, column_B: Tensor, state: State) -> None:
    """The model's own log-probabilities, before any setting, of the drawn tokens and the likeliest ones."""
    log_p_BV = logits_BV.log_softmax(-1)
    row_B = torch.arange(len(token_B), device=token_B.device)
    state.logprob_BN[row_B, column_B] = log_p_BV[row_B, token_B]
    top_logprob_BA, top_BA = log_p_BV.topk(state.top_BNA.shape[2])
    state.top_logprob_BNA[row_B, column_B] = top_logprob_BA
    state.top_BNA[row_B, column_B] = top_BA.int()


def advance(token_B: Tensor, state: State, needs: Needs) -> None:
    """Take in the drawn tokens of the live rows: report them, see whether they end their answers, step on.

    All on the host, in NumPy, whose calls cost less on a few numbers than PyTorch's.
    """
    fields, token = state.fields_BF.numpy(), token_B.numpy()
    row, live, drawn = np.arange(len(fields)), fields[:, LIVE], fields[:, DRAWN]
    state.token_BN.numpy()[row, drawn % state.token_BN.shape[1]] = token
    if needs.penalised:
        state.seen_BV[torch.from_numpy(row), token_B] = True
    fields[:, TOKEN] = token
    drawn += live
    fields[:, POSITION] += live
    live &= (drawn < fields[:, LIMIT]) & ~(fields[:, ENDS:] == token[:, None]).any(axis=1)
