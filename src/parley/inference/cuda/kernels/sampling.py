"""The next token of each row from its logits, without sorting and without the host: three passes over the vocabulary.

    _tops    each block's best score          penalty and temperature are applied as scores are read
    _masses  each block's share of probability, without what min_p leaves out
    _pick    the block and then the token at which the cumulated probability passes the draw; ends and counts

The plain counterpart is `sampling.next_tokens` and `sampling.advance`.

Shape suffixes: B rows, V vocabulary, C blocks of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference import slot_state as fields
from parley.inference.cuda.kernels.dependent_launch import ahead_done, early, next_may_come
from parley.inference.slot_state import State
from parley.train_step.kernels.precompile import kernel

BLOCK = 1024

TOKEN, POSITION, DRAWN = (tl.constexpr(field) for field in (fields.TOKEN, fields.POSITION, fields.DRAWN))
LIMIT, LIVE, SEED = (tl.constexpr(field) for field in (fields.LIMIT, fields.LIVE, fields.SEED))
TEMPERATURE, MIN_P, PENALTY = (tl.constexpr(field) for field in (fields.TEMPERATURE, fields.MIN_P, fields.PENALTY))
ENDS, MOST_ENDS, FIELDS = (tl.constexpr(field) for field in (fields.ENDS, fields.MOST_ENDS, fields.FIELDS))


@triton.jit
def _scores(logits, seen, reals, row, v, V):
    """Penalised and tempered scores of the tokens `v`; greedy rows' are penalised alone."""
    temperature = tl.load(reals + row * FIELDS + TEMPERATURE)
    penalty = tl.load(reals + row * FIELDS + PENALTY)
    score = tl.load(logits + row * V + v, mask=v < V, other=-float("inf"))
    if penalty != 1.0:
        before = tl.load(seen + row * V + v, mask=v < V, other=0) != 0
        score = tl.where(before, tl.where(score < 0, score * penalty, score / penalty), score)
    return score / tl.where(temperature > 0, temperature, 1.0)


@kernel()
def _tops(logits, seen, reals, top, best, V, BLOCK: tl.constexpr):
    next_may_come()
    ahead_done()
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = block * BLOCK + tl.arange(0, BLOCK)
    score = _scores(logits, seen, reals, row, v, V)
    at = row * tl.num_programs(0) + block
    tl.store(top + at, tl.max(score, axis=0))
    tl.store(best + at, block * BLOCK + tl.argmax(score, axis=0))


@triton.jit
def _kept(score, highest, least):
    """Probabilities relative to the likeliest token's, zero below `least`."""
    p = tl.exp(score - highest)
    return tl.where(p < least, 0.0, p)


@kernel()
def _masses(logits, seen, reals, top, mass, V, C, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    next_may_come()
    ahead_done()
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(reals + row * FIELDS + TEMPERATURE) > 0:
        c = tl.arange(0, BLOCK_C)
        highest = tl.max(tl.load(top + row * C + c, mask=c < C, other=-float("inf")), axis=0)
        v = block * BLOCK + tl.arange(0, BLOCK)
        score = _scores(logits, seen, reals, row, v, V)
        kept = _kept(score, highest, tl.load(reals + row * FIELDS + MIN_P))
        tl.store(mass + row * C + block, tl.sum(kept, axis=0))


@triton.jit
def _uniform(seed, place):
    x = (seed + place).to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return (x >> 9).to(tl.float32) * (1.0 / 8388608.0)


@kernel()
def _pick(
    logits, seen, wholes, reals, top, best, mass, told, V, C, N, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    next_may_come()
    ahead_done()
    row = tl.program_id(0).to(tl.int64)
    at = wholes + row * FIELDS
    drawn = tl.load(at + DRAWN)
    c = tl.arange(0, BLOCK_C)
    tops = tl.load(top + row * C + c, mask=c < C, other=-float("inf"))
    highest = tl.max(tops, axis=0)
    token = tl.load(best + row * C + tl.argmax(tops, axis=0))
    if tl.load(reals + row * FIELDS + TEMPERATURE) > 0:
        masses = tl.load(mass + row * C + c, mask=c < C, other=0.0)
        cumulated = tl.cumsum(masses, axis=0)
        goal = _uniform(tl.load(at + SEED), drawn) * tl.sum(masses, axis=0)
        last = tl.max(tl.where(masses > 0, c, 0), axis=0)
        block = tl.minimum(tl.sum((cumulated <= goal).to(tl.int32), axis=0), last)
        rest = goal - tl.sum(tl.where(c < block, masses, 0.0), axis=0)
        v = tl.arange(0, BLOCK)
        score = _scores(logits, seen, reals, row, block * BLOCK + v, V)
        kept = _kept(score, highest, tl.load(reals + row * FIELDS + MIN_P))
        last = tl.max(tl.where(kept > 0, v, 0), axis=0)
        passed = tl.sum((tl.cumsum(kept, axis=0) <= rest).to(tl.int32), axis=0)
        token = block * BLOCK + tl.minimum(passed, last)
    token = tl.minimum(token, V - 1)  # where logits are no numbers, an index still
    live = tl.load(at + LIVE)
    tl.store(told + row * N + drawn % N, token)
    tl.store(at + TOKEN, token)
    tl.store(seen + row * V + token, 1)
    ended = tl.load(at + ENDS + tl.arange(0, MOST_ENDS)) == token
    drawn += live
    over = (tl.sum(ended.to(tl.int32), axis=0) > 0) | (drawn >= tl.load(at + LIMIT))
    tl.store(at + DRAWN, drawn)
    tl.store(at + POSITION, tl.load(at + POSITION) + live)
    tl.store(at + LIVE, tl.where(over, 0, live))


def draw_and_advance(logits_BV: Tensor, state: State) -> None:
    """Draw each row's token from its fp32 `logits_BV`, report it in `state` and step on."""
    rows, vocabulary = logits_BV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    top_BC = torch.empty(rows, blocks, dtype=torch.float32, device=logits_BV.device)
    mass_BC = torch.empty_like(top_BC)
    best_BC = torch.empty(rows, blocks, dtype=torch.int32, device=logits_BV.device)
    wholes, reals = state.fields_BF, state.fields_BF.view(torch.float32)
    seen = state.seen_BV.view(torch.uint8)
    block_c = triton.next_power_of_2(blocks)
    launch = early(logits_BV.device)
    _tops[(blocks, rows)](logits_BV, seen, reals, top_BC, best_BC, vocabulary, BLOCK=BLOCK, **launch)
    _masses[(blocks, rows)](
        logits_BV, seen, reals, top_BC, mass_BC, vocabulary, blocks, BLOCK=BLOCK, BLOCK_C=block_c, **launch
    )
    _pick[(rows,)](
        logits_BV, seen, wholes, reals, top_BC, best_BC, mass_BC, state.token_BN, vocabulary, blocks,
        state.token_BN.shape[1], BLOCK=BLOCK, BLOCK_C=block_c, **launch,
    )  # fmt: skip
