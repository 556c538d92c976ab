"""Sampling the next token of each row on the host: repetition penalty, temperature, top_k, top_p and min_p, in the
order and with the meaning of transformers' logits processors; then inverse transform sampling.

A row's random number depends on its seed and the position in its answer alone, never on the rows beside it.

Shape suffixes besides docs/design.md's: U output columns, A alternatives (see slot_state).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parley.inference.interface import DecodeRequest
from parley.inference.slot_state import (
    MAX_TOKENS,
    MIN_P,
    NUM_SAMPLED,
    PENALTY,
    POSITION,
    RUNNING,
    SEED,
    STOP_IDS,
    TAIL_P,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    SlotState,
)


@dataclass(frozen=True)
class SamplingFeatures:
    """What at least one row of a step asks for: steps without it skip the work."""

    random: bool = False  # a temperature above zero
    penalty: bool = False
    truncation: bool = False  # top_k or top_p, which sort the vocabulary
    logprobs: bool = False

    @classmethod
    def of(cls, requests: Iterable[DecodeRequest]) -> SamplingFeatures:
        requests = list(requests)
        random = [request.settings for request in requests if request.settings.temperature > 0]
        return cls(
            bool(random),
            any(request.settings.repetition_penalty != 1.0 for request in requests),
            any(settings.top_k or settings.top_p < 1.0 for settings in random),
            any(request.logprobs is not None for request in requests),
        )


def apply_repetition_penalty(logits_BV: Tensor, state: SlotState) -> Tensor:
    """Divide the positive logits of tokens seen before by the penalty and multiply the negative ones (CTRL,
    arXiv 1909.05858)."""
    penalty_B1 = state.floats(PENALTY)[:, None]
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(state.seen_BV, penalized_BV, logits_BV)


def apply_temperature(logits_BV: Tensor, state: SlotState) -> Tensor:
    """Logits divided by the temperature; greedy rows unchanged."""
    temperature_B1 = state.floats(TEMPERATURE)[:, None]
    return logits_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)


def truncation_mask(scores_BV: Tensor, state: SlotState) -> Tensor:
    """True for tokens that top_k and then top_p (arXiv 1904.09751) remove. `scores_BV`: after the temperature."""
    vocab_size = scores_BV.shape[1]
    ascending_BV, token_BV = scores_BV.sort(dim=-1)
    top_k_B1 = state.ints(TOP_K)[:, None].long()
    kept_B1 = torch.where((top_k_B1 > 0) & (top_k_B1 < vocab_size), top_k_B1, vocab_size)
    threshold_B1 = ascending_BV.gather(1, vocab_size - kept_B1)
    ascending_BV = ascending_BV.masked_fill(ascending_BV < threshold_B1, -torch.inf)
    tail_B1 = state.floats(TAIL_P)[:, None]
    in_tail_BV = (ascending_BV.softmax(-1).cumsum(-1) <= tail_B1) & (tail_B1 > 0)
    in_tail_BV[:, -1] = False  # as in transformers, the most likely token always stays
    return torch.zeros_like(in_tail_BV).scatter(1, token_BV, in_tail_BV) | (scores_BV < threshold_B1)


def probabilities(logits_BV: Tensor, state: SlotState, features: SamplingFeatures) -> Tensor:
    """Sampling weights, zero for removed tokens; rows need not sum to one. `logits_BV`: after the penalty."""
    scores_BV = apply_temperature(logits_BV, state)
    if features.truncation:
        scores_BV = scores_BV.masked_fill(truncation_mask(scores_BV, state), -torch.inf)
    p_BV = scores_BV.softmax(-1)
    threshold_B1 = state.floats(MIN_P)[:, None] * p_BV.amax(-1, keepdim=True)  # min_p: arXiv 2407.01082
    return p_BV.masked_fill_(p_BV < threshold_B1, 0.0)


def uniform(state: SlotState) -> Tensor:
    """(B,) numbers in [0, 1) of 23 bits: the hash (slot_state.hash32) of seed plus tokens sampled so far.

    `state` is on the host.
    """
    fields = state.fields_BX.numpy().view(np.uint32)
    x_B = fields[:, SEED] + fields[:, NUM_SAMPLED]
    x_B ^= x_B >> 16
    x_B *= np.uint32(0x7FEB352D)
    x_B ^= x_B >> 15
    x_B *= np.uint32(0x846CA68B)
    x_B ^= x_B >> 16
    return torch.from_numpy((x_B >> 9).astype(np.float32) * np.float32(2**-23))


def inverse_transform(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which the cumulative sum of `p_BV` exceeds `u_B` times its total, (B,)."""
    cumulative_BV = p_BV.cumsum(-1)
    token_B = torch.searchsorted(cumulative_BV, u_B[:, None] * cumulative_BV[:, -1:], right=True)[:, 0]
    return token_B.clamp_(max=p_BV.shape[1] - 1)  # a valid id even where the logits are NaN


def sample(logits_BV: Tensor, state: SlotState, features: SamplingFeatures) -> Tensor:
    """The next token of each row, (B,): the most likely where the temperature is zero. `logits_BV`: fp32, on the
    host."""
    if features.penalty:
        logits_BV = apply_repetition_penalty(logits_BV, state)
    greedy_B = torch.from_numpy(logits_BV.numpy().argmax(-1))  # NumPy's argmax takes a tenth of the time of PyTorch's
    if not features.random:
        return greedy_B
    random_B = inverse_transform(probabilities(logits_BV, state, features), uniform(state))
    return torch.where(state.floats(TEMPERATURE) > 0, random_B, greedy_B)


def output_columns(state: SlotState) -> Tensor:
    """The column of each row's next token in the output buffers, (B,)."""
    return (state.ints(NUM_SAMPLED) % state.token_BU.shape[1]).long()


def write_logprobs(logits_BV: Tensor, token_B: Tensor, column_B: Tensor, state: SlotState) -> None:
    """Write the model's own log-probabilities, before any setting, of the sampled and the most likely tokens."""
    log_p_BV = logits_BV.log_softmax(-1)
    row_B = torch.arange(len(token_B), device=token_B.device)
    state.logprob_BU[row_B, column_B] = log_p_BV[row_B, token_B]
    top_logprob_BA, top_BA = log_p_BV.topk(state.top_BUA.shape[2])
    state.top_logprob_BUA[row_B, column_B] = top_logprob_BA
    state.top_BUA[row_B, column_B] = top_BA.int()


def advance(token_B: Tensor, state: SlotState, features: SamplingFeatures) -> None:
    """Write the sampled tokens of running rows to the outputs, step to the next position and stop at stop ids.

    On the host, in NumPy, whose calls cost less than PyTorch's on a few numbers.
    """
    fields, token = state.fields_BX.numpy(), token_B.numpy()
    row, running, num_sampled = np.arange(len(fields)), fields[:, RUNNING], fields[:, NUM_SAMPLED]
    state.token_BU.numpy()[row, num_sampled % state.token_BU.shape[1]] = token
    if features.penalty:
        state.seen_BV[torch.from_numpy(row), token_B] = True
    fields[:, TOKEN] = token
    num_sampled += running
    fields[:, POSITION] += running
    running &= (num_sampled < fields[:, MAX_TOKENS]) & ~(fields[:, STOP_IDS:] == token[:, None]).any(axis=1)


def sample_and_advance(logits_BV: Tensor, state: SlotState, features: SamplingFeatures) -> None:
    """One sampling step of every row. `state` and `logits_BV` are on the host."""
    token_B = sample(logits_BV, state, features)
    if features.logprobs:
        write_logprobs(logits_BV, token_B, output_columns(state), state)
    advance(token_B, state, features)
