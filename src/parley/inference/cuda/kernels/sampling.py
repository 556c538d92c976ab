"""Sampling the next token of each row from its logits, without sorting and without the host: three passes over the
vocabulary, in blocks.

    _block_max   the highest score of each block and its token; penalty and temperature are applied as scores are read
    _block_mass  the probability mass of each block, without the tokens that min_p removes
    _sample      inverse transform sampling, of the block and then of the token in it; then stop ids and counters

The reference is `inference.sampling`: sample and advance. top_k and top_p, which need a sort, are applied to the logits
before these passes.

Shape suffixes besides docs/design.md's: J blocks of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference import slot_state
from parley.inference.cuda.kernels.dependent_launch import launch_dependents, pdl_options, wait_for_previous
from parley.inference.slot_state import SlotState
from parley.train_step.kernels.precompile import kernel

BLOCK = 1024

TOKEN, POSITION, NUM_SAMPLED = (
    tl.constexpr(i) for i in (slot_state.TOKEN, slot_state.POSITION, slot_state.NUM_SAMPLED)
)
MAX_TOKENS, RUNNING, SEED = (tl.constexpr(i) for i in (slot_state.MAX_TOKENS, slot_state.RUNNING, slot_state.SEED))
TEMPERATURE, MIN_P = tl.constexpr(slot_state.TEMPERATURE), tl.constexpr(slot_state.MIN_P)
PENALTY, NUM_FIELDS = tl.constexpr(slot_state.PENALTY), tl.constexpr(slot_state.NUM_FIELDS)
STOP_IDS, MAX_STOP_IDS = tl.constexpr(slot_state.STOP_IDS), tl.constexpr(slot_state.MAX_STOP_IDS)


@triton.jit
def _scores(logits, seen, floats, row, v, V):
    """Scores of the tokens `v` after penalty and temperature; of greedy rows after the penalty alone."""
    temperature = tl.load(floats + row * NUM_FIELDS + TEMPERATURE)
    penalty = tl.load(floats + row * NUM_FIELDS + PENALTY)
    score = tl.load(logits + row * V + v, mask=v < V, other=-float("inf"))
    if penalty != 1.0:
        seen_before = tl.load(seen + row * V + v, mask=v < V, other=0) != 0
        score = tl.where(seen_before, tl.where(score < 0, score * penalty, score / penalty), score)
    return score / tl.where(temperature > 0, temperature, 1.0)


@kernel()
def _block_max(logits, seen, floats, block_max_at, block_argmax_at, V, BLOCK: tl.constexpr):
    launch_dependents()
    wait_for_previous()
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    score = _scores(logits, seen, floats, row, v, V)
    index = row * tl.num_programs(0) + block
    tl.store(block_max_at + index, tl.max(score, axis=0))
    tl.store(block_argmax_at + index, block * BLOCK + tl.argmax(score, axis=0))


@triton.jit
def _weights(score, maximum, min_p):
    """Probabilities relative to the most likely token's, zero below `min_p`."""
    p = tl.exp(score - maximum)
    return tl.where(p < min_p, 0.0, p)


@kernel()
def _block_mass(logits, seen, floats, block_max_at, block_mass_at, V, J, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr):
    launch_dependents()
    wait_for_previous()
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(floats + row * NUM_FIELDS + TEMPERATURE) > 0:
        j = tl.arange(0, BLOCK_J)
        maximum = tl.max(tl.load(block_max_at + row * J + j, mask=j < J, other=-float("inf")), axis=0)
        v = block * BLOCK + tl.arange(0, BLOCK)
        score = _scores(logits, seen, floats, row, v, V)
        weight = _weights(score, maximum, tl.load(floats + row * NUM_FIELDS + MIN_P))
        tl.store(block_mass_at + row * J + block, tl.sum(weight, axis=0))


@triton.jit
def _uniform(seed, num_sampled):
    """A number in [0, 1) of 23 bits: slot_state.hash32 of the sum, as in inference.sampling.uniform."""
    x = (seed + num_sampled).to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 9).to(tl.float32) * (1.0 / 8388608.0)


@kernel()
def _sample(
    logits, seen, ints, floats, block_max_at, block_argmax_at, block_mass_at, out, V, J, U,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    launch_dependents()
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    fields = ints + row * NUM_FIELDS
    num_sampled = tl.load(fields + NUM_SAMPLED)
    j = tl.arange(0, BLOCK_J)
    block_max = tl.load(block_max_at + row * J + j, mask=j < J, other=-float("inf"))
    maximum = tl.max(block_max, axis=0)
    token = tl.load(block_argmax_at + row * J + tl.argmax(block_max, axis=0))
    if tl.load(floats + row * NUM_FIELDS + TEMPERATURE) > 0:
        block_mass = tl.load(block_mass_at + row * J + j, mask=j < J, other=0.0)
        cumulative = tl.cumsum(block_mass, axis=0)
        target = _uniform(tl.load(fields + SEED), num_sampled) * tl.sum(block_mass, axis=0)
        # Rounding may leave the target at or above the total: the last block, and token, of nonzero mass is the limit.
        last = tl.max(tl.where(block_mass > 0, j, 0), axis=0)
        block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), axis=0), last)
        remaining = target - tl.sum(tl.where(j < block, block_mass, 0.0), axis=0)
        v = tl.arange(0, BLOCK)
        score = _scores(logits, seen, floats, row, block * BLOCK + v, V)
        weight = _weights(score, maximum, tl.load(floats + row * NUM_FIELDS + MIN_P))
        last = tl.max(tl.where(weight > 0, v, 0), axis=0)
        below = tl.sum((tl.cumsum(weight, axis=0) <= remaining).to(tl.int32), axis=0)
        token = block * BLOCK + tl.minimum(below, last)
    token = tl.minimum(token, V - 1)  # a valid id even where the logits are NaN
    running = tl.load(fields + RUNNING)
    tl.store(out + row * U + num_sampled % U, token)
    tl.store(fields + TOKEN, token)
    tl.store(seen + row * V + token, 1)
    stopped = tl.load(fields + STOP_IDS + tl.arange(0, MAX_STOP_IDS)) == token
    num_sampled += running
    finished = (tl.sum(stopped.to(tl.int32), axis=0) > 0) | (num_sampled >= tl.load(fields + MAX_TOKENS))
    tl.store(fields + NUM_SAMPLED, num_sampled)
    tl.store(fields + POSITION, tl.load(fields + POSITION) + running)
    tl.store(fields + RUNNING, tl.where(finished, 0, running))


def sample_and_advance(logits_BV: Tensor, state: SlotState) -> None:
    """Sample each row's token from its fp32 `logits_BV`, write it to the outputs of `state` and advance."""
    rows, vocab_size = logits_BV.shape
    blocks = triton.cdiv(vocab_size, BLOCK)
    max_BJ = torch.empty(rows, blocks, dtype=torch.float32, device=logits_BV.device)
    mass_BJ = torch.empty_like(max_BJ)
    argmax_BJ = torch.empty(rows, blocks, dtype=torch.int32, device=logits_BV.device)
    ints, floats = state.fields_BX, state.fields_BX.view(torch.float32)
    seen = state.seen_BV.view(torch.uint8)
    block_j = triton.next_power_of_2(blocks)
    options = pdl_options(logits_BV.device)
    _block_max[(blocks, rows)](logits_BV, seen, floats, max_BJ, argmax_BJ, vocab_size, BLOCK=BLOCK, **options)
    _block_mass[(blocks, rows)](
        logits_BV, seen, floats, max_BJ, mass_BJ, vocab_size, blocks, BLOCK=BLOCK, BLOCK_J=block_j, **options
    )
    _sample[(rows,)](
        logits_BV, seen, ints, floats, max_BJ, argmax_BJ, mass_BJ, state.token_BU, vocab_size, blocks,
        state.token_BU.shape[1], BLOCK=BLOCK, BLOCK_J=block_j, **options,
    )  # fmt: skip
