"""Decode attention: one new query per row over its cached keys, with QK norm, rotary embedding and cache update.

Algorithm: flash-decoding with split KV. The grid is (splits, KV heads, rows): each program takes one split of the
positions of one KV head, with the query heads that share the KV head as one tile, so that no key is read twice. The
softmax is the online one of FlashAttention, in base 2.

Synchronisation: the programs of a (row, KV head) count their arrivals atomically after they have stored their partial
results; the last one to arrive combines them. Only as many positions as the row has are read, and only as many splits
as they fill take part, so that one CUDA graph serves rows of any length.

Shape suffixes besides docs/design.md's: Q query heads that share a KV head (Q = H / G).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference.cuda.kernels.dependent_launch import launch_dependents, pdl_options, wait_for_previous
from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.split_reduction import is_last_to_arrive
from parley.train_step.kernels.tanh import tanh
from parley.train_step.ops import AttentionShape, QkNorm, RopeTable

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e6)  # finite: a split without a position must not become NaN
MIN_DOT_ROWS = 16  # the tensor cores take at least so many rows
BLOCK_POSITIONS = 64
PROGRAMS = 128  # enough to occupy a large GPU; more splits cost more to combine
MAX_SPLITS = 32


@triton.jit
def _load_heads(
    x, weight, cos, sin, e, mask, eps, E: tl.constexpr, BLOCK_E: tl.constexpr, HALF: tl.constexpr,
    QK_NORM: tl.constexpr,
):  # fmt: skip
    """Heads at the pointers `x` (rows, 1), normalised where QK_NORM says so, (rows, BLOCK_E) in fp32.

    The first 2 HALF elements are rotated: none with a HALF of 0. Columns from E on are zero.
    """
    mask = mask & (e < E)
    value = tl.load(x + e, mask=mask, other=0.0).to(tl.float32)
    if QK_NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / E + eps)[:, None]
        value *= inverse * tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
    if HALF == 0:
        return value
    partner = tl.where(e < HALF, e + HALF, e - HALF)
    rotated = e < 2 * HALF
    partner_value = tl.load(x + partner, mask=mask & rotated, other=0.0).to(tl.float32)
    if QK_NORM:
        partner_value *= inverse * tl.load(weight + partner, mask=rotated, other=0.0).to(tl.float32)
    turned = value * cos + tl.where(e < HALF, -partner_value, partner_value) * sin
    return tl.where(rotated, turned, value)


@triton.jit
def _load_kv(keys, values, begin, end, e, E: tl.constexpr, BLOCK_L: tl.constexpr):
    """Keys and values (L, BLOCK_E) of BLOCK_L positions, zero from `end` and from E on."""
    position = begin + tl.arange(0, BLOCK_L)[:, None]
    offset = position.to(tl.int64) * E + e
    inside = (position < end) & (e < E)
    return tl.load(keys + offset, mask=inside, other=0.0), tl.load(values + offset, mask=inside, other=0.0)


@triton.jit
def _scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled and capped, in units of log2(e)."""
    s = products * scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s * LOG2_E


@triton.jit
def _online_softmax(
    query, key, value, begin, end, m, denom, acc, scale, softcap, SOFTCAP: tl.constexpr, BLOCK_L: tl.constexpr
):
    """One block of the online softmax: running maximum m (Q), sum of weights denom (Q), weighted values acc
    (Q, BLOCK_E)."""
    inside = begin + tl.arange(0, BLOCK_L)[None, :] < end
    s = _scores(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, softcap, SOFTCAP)
    s = tl.where(inside, s, MASKED)
    new_m = tl.maximum(m, tl.max(s, axis=1))
    p = tl.where(inside, tl.exp2(s - new_m[:, None]), 0.0)
    rescale = tl.exp2(m - new_m)
    denom = denom * rescale + tl.sum(p, axis=1)
    acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
    return new_m, denom, acc


@kernel()
def _decode_attention(
    qkv, cache, out, position_at, cos, sin, q_norm, k_norm, partial_acc, partial_ml, arrivals,
    qkv_stride, row_stride, value_stride, head_stride, out_stride, position_stride, eps, scale, window, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    HALF: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, QK_NORM: tl.constexpr,
    GROUP_POW2: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    launch_dependents()
    position = tl.load(position_at + row * position_stride)
    first = 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    # Splits are whole blocks; a short row fills fewer of them than the grid has, at least one for the new token.
    per_split = tl.maximum(tl.cdiv(tl.cdiv(position - first, SPLITS), BLOCK_L), 1) * BLOCK_L
    used_splits = tl.maximum(tl.cdiv(position - first, per_split), 1)
    if split >= used_splits:
        return
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, position)
    e = tl.arange(0, BLOCK_E)[None, :]
    in_head = e < E
    q = tl.arange(0, BLOCK_Q)
    in_group = (q < GROUP)[:, None]
    qkv += row * qkv_stride
    keys = cache + row * row_stride + kv_head * head_stride
    values = keys + value_stride
    # The cache is loaded before the wait. With one split there are enough programs to overlap loads with each other.
    if SPLITS > 1:
        key, value = _load_kv(keys, values, begin, end, e, E, BLOCK_L)
    cosine, sine = 0.0, 0.0
    if HALF > 0:
        rotary = position * HALF + e % HALF
        cosine = tl.load(cos + rotary).to(tl.float32)
        sine = tl.load(sin + rotary).to(tl.float32)
    wait_for_previous()
    query = _load_heads(
        qkv + (kv_head * GROUP + q)[:, None] * E, q_norm, cosine, sine, e, in_group, eps, E, BLOCK_E, HALF, QK_NORM
    )
    query = query.to(qkv.dtype.element_ty)
    m = tl.full((BLOCK_Q,), MASKED, tl.float32)
    denom = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    # The first split takes the new token, which attends to itself, and stores its key and value.
    if split == 0:
        single = tl.arange(0, 1)[:, None]
        new_key = _load_heads(
            qkv + (HEADS + kv_head) * E + single,
            k_norm,
            cosine,
            sine,
            e,
            single < 1,
            eps,
            E,
            BLOCK_E,
            HALF,
            QK_NORM,
        )
        new_key = new_key.to(qkv.dtype.element_ty)
        new_value = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * E + e, mask=in_head, other=0.0)
        tl.store(keys + position.to(tl.int64) * E + e, new_key, mask=in_head)
        tl.store(values + position.to(tl.int64) * E + e, new_value, mask=in_head)
        m = _scores(tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1), scale, softcap, SOFTCAP)
        denom += 1.0
        acc += new_value.to(tl.float32)
    if SPLITS > 1:
        m, denom, acc = _online_softmax(query, key, value, begin, end, m, denom, acc, scale, softcap, SOFTCAP, BLOCK_L)
        begin += BLOCK_L
    for start in range(begin, end, BLOCK_L):
        key, value = _load_kv(keys, values, start, end, e, E, BLOCK_L)
        m, denom, acc = _online_softmax(query, key, value, start, end, m, denom, acc, scale, softcap, SOFTCAP, BLOCK_L)
    out += row * out_stride + kv_head * GROUP * E
    if (SPLITS == 1) or (used_splits == 1):
        result = acc / denom[:, None]
        tl.store(out + q[:, None] * E + e, result.to(out.dtype.element_ty), mask=in_group & in_head)
    else:
        head = row * KV_HEADS + kv_head
        partial_acc += head * SPLITS * GROUP * E
        partial_ml += head * SPLITS * GROUP * 2
        tl.store(partial_acc + split * GROUP * E + q[:, None] * E + e, acc, mask=in_group & in_head)
        tl.store(partial_ml + (split * GROUP + q) * 2, m, mask=q < GROUP)
        tl.store(partial_ml + (split * GROUP + q) * 2 + 1, denom, mask=q < GROUP)
        if is_last_to_arrive(arrivals + head, used_splits):
            tl.store(arrivals + head, 0)
            # All splits in one load each: a dependent round trip to memory takes as long as a whole split. They were
            # written by other processors, so the loads bypass the L1 cache (.cg).
            s, g = tl.arange(0, SPLITS)[:, None], tl.arange(0, GROUP_POW2)[None, :]
            inside = (s < used_splits) & (g < GROUP)
            index = s * GROUP + g
            split_m = tl.load(partial_ml + 2 * index, mask=inside, other=MASKED, cache_modifier=".cg")
            split_l = tl.load(partial_ml + 2 * index + 1, mask=inside, other=0.0, cache_modifier=".cg")
            split_acc = tl.load(
                partial_acc + index[:, :, None] * E + e[None], mask=inside[:, :, None] & in_head[None], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            weight = tl.exp2(split_m - tl.max(split_m, axis=0, keep_dims=True))
            total = tl.sum(weight * split_l, axis=0) + (tl.arange(0, GROUP_POW2) >= GROUP)  # padding: not 0 / 0
            result = tl.sum(split_acc * weight[:, :, None], axis=0) / total[:, None]
            group = tl.arange(0, GROUP_POW2)[:, None]
            tl.store(out + group * E + e, result.to(out.dtype.element_ty), mask=(group < GROUP) & in_head)


@dataclass(frozen=True)
class SplitBuffers:
    """The partial results of the splits: `acc` (split, Q, E) and `ml` (split, Q, 2) for each row and KV head.

    `arrivals` is zero between launches. `programs`: the number of programs that few rows are split into.
    """

    acc: Tensor
    ml: Tensor
    arrivals: Tensor
    programs: int

    @classmethod
    def allocate(cls, rows: int, shape: AttentionShape, device: torch.device, programs: int = PROGRAMS) -> SplitBuffers:
        """Buffers for any number of rows up to `rows`, in layers of this shape."""
        splits = max(num_splits(row + 1, shape, programs) * (row + 1) for row in range(rows))
        return cls(
            torch.empty(splits * shape.heads * shape.head_dim, dtype=torch.float32, device=device),
            torch.empty(splits * shape.heads * 2, dtype=torch.float32, device=device),
            torch.zeros(rows * shape.kv_heads, dtype=torch.int32, device=device),
            programs,
        )


def num_splits(rows: int, shape: AttentionShape, programs: int) -> int:
    """How many splits a row's positions are cut into: a power of two."""
    return min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(programs, rows * shape.kv_heads)))


def decode_attention(
    qkv_BC: Tensor, cache_B2GLE: Tensor, out_BD: Tensor, position_B: Tensor, rope: RopeTable | None,
    shape: AttentionShape, norms: QkNorm | None, buffers: SplitBuffers,
) -> None:  # fmt: skip
    """Write the attention of each row's new token, whose unrotated queries, keys and values are `qkv_BC`, to `out_BD`.

    `rope`: None for a layer without rotary embeddings; `norms` are those of single heads.

    Its keys and values are written to the cache at `position_B`; the positions before that are read. Under
    programmatic dependent launch they are read before the previous kernel has ended: that one must write neither the
    cache nor `position_B`.
    """
    rows, group = qkv_BC.shape[0], shape.heads // shape.kv_heads
    splits = num_splits(rows, shape, buffers.programs)
    assert cache_B2GLE.stride(3) == shape.head_dim
    _decode_attention[(splits, shape.kv_heads, rows)](
        qkv_BC, cache_B2GLE, out_BD, position_B,
        qkv_BC if rope is None else rope.cos_LE, qkv_BC if rope is None else rope.sin_LE,
        qkv_BC if norms is None else norms.q, qkv_BC if norms is None else norms.k,
        buffers.acc, buffers.ml, buffers.arrivals,
        qkv_BC.stride(0), cache_B2GLE.stride(0), cache_B2GLE.stride(1), cache_B2GLE.stride(2), out_BD.stride(0),
        position_B.stride(0), 0.0 if norms is None else norms.eps, shape.scale, shape.window or 0, shape.softcap or 0.0,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, GROUP=group, E=shape.head_dim,
        BLOCK_E=triton.next_power_of_2(shape.head_dim), HALF=0 if rope is None else rope.cos_LE.shape[1],
        SPLITS=splits, WINDOW=shape.window is not None, SOFTCAP=shape.softcap is not None,
        QK_NORM=norms is not None, GROUP_POW2=triton.next_power_of_2(group),
        BLOCK_Q=max(MIN_DOT_ROWS, triton.next_power_of_2(group)), BLOCK_L=BLOCK_POSITIONS, num_warps=4,
        **pdl_options(qkv_BC.device),
    )  # fmt: skip
