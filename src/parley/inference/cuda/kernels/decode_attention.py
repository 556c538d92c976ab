"""One new query a row over its cached keys: head norms, rotation, the new keys and values into the cache, attention.

Flash-decoding: programs take a row, a key-value head and a share of the positions; queries that share keys are one
tile, so that nothing is repeated or read twice. The last program of a head to finish adds the shares up. Only as many
positions as the row has are read, and by as many programs, so one CUDA graph serves rows of any length.

Shape suffixes: B rows, C query, key and value columns, D query columns (H E), H heads, K key-value heads, L positions,
G queries that share keys, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference.cuda.kernels.dependent_launch import ahead_done, early, next_may_come
from parley.train_step.kernels.precompile import kernel
from parley.train_step.ops import AttentionShape, QkNorm, RopeTable

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e6)  # finite: a share without a position must not turn into NaN
TILE = 16  # rows that the matrix units take at least
POSITIONS = 64  # of a tile
PROGRAMS = 128  # that keep a large GPU busy; more have more to add up
MOST_SHARES = 32


@triton.jit
def _turned(x, weight, cos, sin, e, mask, eps, E: tl.constexpr, HEAD_NORMS: tl.constexpr):
    """Heads at the pointers `x` (rows, 1), normalised if need be and rotated by `cos` and `sin`, (rows, E) in fp32."""
    HALF: tl.constexpr = E // 2
    partner = (e + HALF) % E
    value = tl.load(x + e, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=mask, other=0.0).to(tl.float32)
    if HEAD_NORMS:
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / E + eps)[:, None]
        value *= inverse * tl.load(weight + e).to(tl.float32)
        other *= inverse * tl.load(weight + partner).to(tl.float32)
    return value * cos + tl.where(e < HALF, -other, other) * sin


@triton.jit
def _cached(keys, values, begin, until, e, E: tl.constexpr, BLOCK_L: tl.constexpr):
    """Keys and values (L, E) of BLOCK_L positions, zero from `until` on."""
    at = begin + tl.arange(0, BLOCK_L)[:, None]
    place = at.to(tl.int64) * E + e
    return tl.load(keys + place, mask=at < until, other=0.0), tl.load(values + place, mask=at < until, other=0.0)


@triton.jit
def _seen(query, key, value, begin, until, top, total, summed, scale, BLOCK_L: tl.constexpr):
    """What the queries (G, E) have summed up (G, E), its weights' total (G) and their top (G), with one tile more."""
    seen = begin + tl.arange(0, BLOCK_L)[None, :] < until
    s = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
    s = tl.where(seen, s, HIDDEN)
    higher = tl.maximum(top, tl.max(s, axis=1))
    p = tl.where(seen, tl.exp2(s - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, axis=1)
    summed = tl.dot(p.to(value.dtype), value, summed * shrink[:, None], input_precision="ieee")
    return higher, total, summed


@kernel()
def _attend(
    qkv, cache, out, position_at, cos, sin, q_norm, k_norm, shares, tops, arrived,
    qkv_stride, row_stride, value_stride, head_stride, out_stride, position_stride, eps, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, SHARES: tl.constexpr,
    WINDOW: tl.constexpr, HEAD_NORMS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    share, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    next_may_come()
    position = tl.load(position_at + row * position_stride)
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    each = tl.maximum(tl.cdiv(tl.cdiv(position - first, SHARES), BLOCK_L), 1) * BLOCK_L
    busy = tl.maximum(tl.cdiv(position - first, each), 1)  # shares that have a position, or the new one
    if share >= busy:
        return
    begin = first + share * each
    until = tl.minimum(begin + each, position)
    e = tl.arange(0, E)[None, :]
    g = tl.arange(0, BLOCK_G)
    in_group = (g < GROUP)[:, None]
    qkv += row * qkv_stride
    keys = cache + row * row_stride + kv_head * head_stride
    values = keys + value_stride
    if SHARES > 1:  # with many rows there are enough programs for one to read while another waits
        key, value = _cached(keys, values, begin, until, e, E, BLOCK_L)
    turn = position * (E // 2) + e % (E // 2)
    cosine = tl.load(cos + turn).to(tl.float32)
    sine = tl.load(sin + turn).to(tl.float32)
    ahead_done()
    query = _turned(qkv + (kv_head * GROUP + g)[:, None] * E, q_norm, cosine, sine, e, in_group, eps, E, HEAD_NORMS)
    query = query.to(qkv.dtype.element_ty)
    top = tl.full((BLOCK_G,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    summed = tl.zeros((BLOCK_G, E), tl.float32)
    if share == 0:  # the new token sees itself, and is kept for those after it
        one = tl.arange(0, 1)[:, None]
        new_key = _turned(qkv + (HEADS + kv_head) * E + one, k_norm, cosine, sine, e, one < 1, eps, E, HEAD_NORMS).to(
            qkv.dtype.element_ty
        )
        new_value = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * E + e)
        tl.store(keys + position.to(tl.int64) * E + e, new_key)
        tl.store(values + position.to(tl.int64) * E + e, new_value)
        top = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * (scale * LOG2_E)
        total += 1.0
        summed += new_value.to(tl.float32)
    if SHARES > 1:
        top, total, summed = _seen(query, key, value, begin, until, top, total, summed, scale, BLOCK_L)
        begin += BLOCK_L
    for start in range(begin, until, BLOCK_L):
        key, value = _cached(keys, values, start, until, e, E, BLOCK_L)
        top, total, summed = _seen(query, key, value, start, until, top, total, summed, scale, BLOCK_L)
    out += row * out_stride + kv_head * GROUP * E
    if (SHARES == 1) or (busy == 1):
        result = summed / total[:, None]
        tl.store(out + g[:, None] * E + e, result.to(out.dtype.element_ty), mask=in_group)
    else:
        head = row * KV_HEADS + kv_head
        shares += head * SHARES * GROUP * E
        tops += head * SHARES * GROUP * 2
        tl.store(shares + share * GROUP * E + g[:, None] * E + e, summed, mask=in_group)
        tl.store(tops + (share * GROUP + g) * 2, top, mask=g < GROUP)
        tl.store(tops + (share * GROUP + g) * 2 + 1, total, mask=g < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == busy - 1:
            tl.store(arrived + head, 0)
            # All at once, as each look into memory takes as long as a whole share.
            s, m = tl.arange(0, SHARES)[:, None], tl.arange(0, MEMBERS)[None, :]
            inside = (s < busy) & (m < GROUP)
            at = s * GROUP + m
            level = tl.load(tops + 2 * at, mask=inside, other=HIDDEN, cache_modifier=".cg")
            mass = tl.load(tops + 2 * at + 1, mask=inside, other=0.0, cache_modifier=".cg")
            part = tl.load(
                shares + at[:, :, None] * E + e[None], mask=inside[:, :, None], other=0.0, cache_modifier=".cg"
            )
            weight = tl.exp2(level - tl.max(level, axis=0, keep_dims=True))
            whole = tl.sum(weight * mass, axis=0) + (tl.arange(0, MEMBERS) >= GROUP)
            result = tl.sum(part * weight[:, :, None], axis=0) / whole[:, None]
            member = tl.arange(0, MEMBERS)[:, None]
            tl.store(out + member * E + e, result.to(out.dtype.element_ty), mask=member < GROUP)


@dataclass(frozen=True)
class Shares:
    """Room for what the programs of a head add up. `arrived` is zero between launches."""

    summed: Tensor
    top: Tensor
    arrived: Tensor
    programs: int

    @classmethod
    def room(cls, rows: int, shape: AttentionShape, device: torch.device, programs: int = PROGRAMS) -> Shares:
        """Enough for up to `rows` rows of layers of `shape`; few rows are cut so that there are some `programs`."""
        most = max(share_count(row + 1, shape, programs) * (row + 1) for row in range(rows))
        return cls(
            torch.empty(most * shape.heads * shape.head_dim, dtype=torch.float32, device=device),
            torch.empty(most * shape.heads * 2, dtype=torch.float32, device=device),
            torch.zeros(rows * shape.kv_heads, dtype=torch.int32, device=device),
            programs,
        )


def share_count(rows: int, shape: AttentionShape, programs: int) -> int:
    """Into how many shares a row's positions are cut: a power of two."""
    return min(MOST_SHARES, triton.next_power_of_2(triton.cdiv(programs, rows * shape.kv_heads)))


def attend(
    qkv_BC: Tensor, cache_B2KLE: Tensor, out_BD: Tensor, position_B: Tensor, rope: RopeTable, shape: AttentionShape,
    norms: QkNorm | None, shares: Shares,
) -> None:  # fmt: skip
    """Attention of each row's new token, whose queries, keys and values `qkv_BC` holds unrotated, into `out_BD`.

    Its keys and values are written to the cache at `position_B`; positions before that are read. Reading may begin
    before the launch ahead has ended: that one must write neither the cache nor `position_B`.
    """
    rows, group = qkv_BC.shape[0], shape.heads // shape.kv_heads
    count = share_count(rows, shape, shares.programs)
    assert cache_B2KLE.stride(3) == shape.head_dim
    _attend[(count, shape.kv_heads, rows)](
        qkv_BC, cache_B2KLE, out_BD, position_B, rope.cos_LE, rope.sin_LE,
        qkv_BC if norms is None else norms.q_E, qkv_BC if norms is None else norms.k_E,
        shares.summed, shares.top, shares.arrived,
        qkv_BC.stride(0), cache_B2KLE.stride(0), cache_B2KLE.stride(1), cache_B2KLE.stride(2), out_BD.stride(0),
        position_B.stride(0), 0.0 if norms is None else norms.eps, shape.scale, shape.window or 0,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, GROUP=group, E=shape.head_dim, SHARES=count,
        WINDOW=shape.window is not None, HEAD_NORMS=norms is not None, MEMBERS=triton.next_power_of_2(group),
        BLOCK_G=max(TILE, triton.next_power_of_2(group)), BLOCK_L=POSITIONS, num_warps=4,
        **early(qkv_BC.device),
    )  # fmt: skip
