"""Causal attention inside the documents of a packed row, with grouped key-value heads, forward and backward.

FlashAttention-2 (arXiv 2307.08691) in tiles of rows. A tile of queries starts at the first row of the document that
its first query belongs to, so nothing is launched or read for pairs in different documents, and a CUDA graph can be
replayed for any documents: only `start_T` and `end_T` know them. Where the host does too, long ones go to flash.py.

Shape suffixes: T tokens, D query columns (H E), C query, key and value columns side by side, H heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels import library_attention
from parley.train_step.kernels.precompile import kernel
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1.0e6)  # finite: a tile that a query sees nothing of must not turn into NaN
ROWS = 64  # a pack's rows are padded to tiles of so many
PROGRAMS = 400  # three for each multiprocessor of an H200: fewer leave it idle


@triton.jit
def _visible(query, key, first, window, WINDOW: tl.constexpr):
    seen = (key >= first) & (key <= query)
    if WINDOW:
        seen = seen & (key > query - window)
    return seen


@kernel("T")
def _forward(
    q, k, v, out, lse, start, x_stride, out_stride, scale, window, T,
    GROUP: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, E)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_at = row.to(tl.int64)[:, None]
    inside = row < T
    first = tl.load(start + row, mask=inside, other=T)
    query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=inside[:, None], other=0.0)
    k += (head // GROUP) * E
    v += (head // GROUP) * E
    top = tl.full((BLOCK_Q,), HIDDEN, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    summed = tl.zeros((BLOCK_Q, E), tl.float32)
    from_key = tl.min(first, axis=0)
    if WINDOW:
        from_key = tl.maximum(from_key, tile * BLOCK_Q - window + 1)
    for begin in range(from_key // BLOCK_K * BLOCK_K, tl.minimum((tile + 1) * BLOCK_Q, T), BLOCK_K):
        col = begin + tl.arange(0, BLOCK_K)
        col_at = col.to(tl.int64)[:, None] * x_stride + e[None, :]
        key = tl.load(k + col_at, mask=col[:, None] < T, other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        s = tl.where(_visible(row[:, None], col[None, :], first[:, None], window, WINDOW), s, HIDDEN)
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        value = tl.load(v + col_at, mask=col[:, None] < T, other=0.0)
        summed = tl.dot(p.to(value.dtype), value, summed * shrink[:, None], input_precision="ieee")
        top = higher
    summed = summed / total[:, None]
    tl.store(out + row_at * out_stride + head * E + e[None, :], summed.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * T + row, top + tl.log2(total), mask=inside)


@kernel()
def _backward_queries(
    q, k, v, out, dout, dq, lse, delta, start, x_stride, out_stride, dout_stride, dx_stride, scale, window, T,
    GROUP: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, E)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_at = row.to(tl.int64)[:, None]
    inside = row < T
    whole = inside[:, None]
    first = tl.load(start + row, mask=inside, other=T)
    query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=whole, other=0.0)
    dsummed = tl.load(dout + row_at * dout_stride + head * E + e[None, :], mask=whole, other=0.0)
    summed = tl.load(out + row_at * out_stride + head * E + e[None, :], mask=whole, other=0.0)
    along = tl.sum(summed.to(tl.float32) * dsummed.to(tl.float32), axis=1)
    tl.store(delta + head * T + row, along, mask=inside)
    level = tl.load(lse + head * T + row, mask=inside, other=0.0)
    k += (head // GROUP) * E
    v += (head // GROUP) * E
    dquery = tl.zeros((BLOCK_Q, E), tl.float32)
    from_key = tl.min(first, axis=0)
    if WINDOW:
        from_key = tl.maximum(from_key, tile * BLOCK_Q - window + 1)
    for begin in range(from_key // BLOCK_K * BLOCK_K, tl.minimum((tile + 1) * BLOCK_Q, T), BLOCK_K):
        col = begin + tl.arange(0, BLOCK_K)
        col_at = col.to(tl.int64)[:, None] * x_stride + e[None, :]
        key = tl.load(k + col_at, mask=col[:, None] < T, other=0.0)
        value = tl.load(v + col_at, mask=col[:, None] < T, other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        seen = _visible(row[:, None], col[None, :], first[:, None], window, WINDOW)
        p = tl.where(seen, tl.exp2(s - level[:, None]), 0.0)
        dp = tl.dot(dsummed, tl.trans(value), input_precision="ieee")
        ds = p * (dp - along[:, None]) * scale
        dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision="ieee")
    tl.store(dq + row_at * dx_stride + head * E + e[None, :], dquery.to(dq.dtype.element_ty), mask=whole)


@kernel()
def _backward_keys(
    q, k, v, dout, dk, dv, lse, delta, start, end, sums, arrived, x_stride, dout_stride, dx_stride, scale, window, T,
    GROUP: tl.constexpr, E: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values.

    With two SHARES the query heads of a group are shared by two programs, and the one that arrives last adds up both
    sums: a + b is b + a, so that equal inputs give equal bits.
    """
    tile, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    e = tl.arange(0, E)
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_at = col.to(tl.int64)[:, None]
    whole = col[:, None] < T
    key = tl.load(k + col_at * x_stride + kv_head * E + e[None, :], mask=whole, other=0.0)
    value = tl.load(v + col_at * x_stride + kv_head * E + e[None, :], mask=whole, other=0.0)
    until = tl.max(tl.load(end + col, mask=col < T, other=0), axis=0)
    if WINDOW:
        until = tl.minimum(until, (tile + 1) * BLOCK_K - 1 + window)
    dkey = tl.zeros((BLOCK_K, E), tl.float32)
    dvalue = tl.zeros((BLOCK_K, E), tl.float32)
    for member in range(share * (GROUP // SHARES), (share + 1) * (GROUP // SHARES)):
        head = kv_head * GROUP + member
        for begin in range(tile * BLOCK_K // BLOCK_Q * BLOCK_Q, until, BLOCK_Q):
            row = begin + tl.arange(0, BLOCK_Q)
            row_at = row.to(tl.int64)[:, None]
            inside = row < T
            query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=inside[:, None], other=0.0)
            dsummed = tl.load(dout + row_at * dout_stride + head * E + e[None, :], mask=inside[:, None], other=0.0)
            first = tl.load(start + row, mask=inside, other=T)
            level = tl.load(lse + head * T + row, mask=inside, other=0.0)
            along = tl.load(delta + head * T + row, mask=inside, other=0.0)
            s = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E)
            seen = _visible(row[None, :], col[:, None], first[None, :], window, WINDOW) & inside[None, :]
            p = tl.where(seen, tl.exp2(s - level[None, :]), 0.0)
            dvalue = tl.dot(p.to(value.dtype), dsummed, dvalue, input_precision="ieee")
            dp = tl.dot(value, tl.trans(dsummed), input_precision="ieee")
            ds = p * (dp - along[None, :]) * scale
            dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision="ieee")
    last = True
    if SHARES == 2:
        place = kv_head * tl.num_programs(0) + tile
        at = sums + place * (4 * BLOCK_K * E) + tl.arange(0, BLOCK_K)[:, None] * E + e[None, :]
        mine, other = at + share * (2 * BLOCK_K * E), at + (1 - share) * (2 * BLOCK_K * E)
        tl.store(mine, dkey)
        tl.store(mine + BLOCK_K * E, dvalue)
        tl.debug_barrier()  # all of this program's stores, before it says that it has arrived
        last = tl.atomic_add(arrived + place, 1) == 1
        if last:
            dkey += tl.load(other, cache_modifier=".cg")
            dvalue += tl.load(other + BLOCK_K * E, cache_modifier=".cg")
    if last:
        tl.store(dk + col_at * dx_stride + kv_head * E + e[None, :], dkey.to(dk.dtype.element_ty), mask=whole)
        tl.store(dv + col_at * dx_stride + kv_head * E + e[None, :], dvalue.to(dv.dtype.element_ty), mask=whole)


def _constants(shape: AttentionShape, stages: int) -> dict[str, int | bool]:
    """The stages are measured, with heads of 64 and of 128: a kernel that holds more sums has registers for fewer."""
    assert shape.head_dim == triton.next_power_of_2(shape.head_dim), "bind lets no other head size through"
    return {
        "GROUP": shape.heads // shape.kv_heads,
        "E": shape.head_dim,
        "WINDOW": shape.window is not None,
        "BLOCK_Q": ROWS,
        "BLOCK_K": ROWS,
        "num_warps": 4,
        "num_stages": stages,
    }


def attention(x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor) -> Any:
    if library_attention.applies(x_TC, batch):
        return library_attention.attention(x_TC, batch, shape, out_TD)
    tokens = x_TC.shape[0]
    q, k, v = shape.split_qkv(x_TC)
    lse_HT = torch.empty(shape.heads, tokens, dtype=torch.float32, device=x_TC.device)
    _forward[(triton.cdiv(tokens, ROWS), shape.heads)](
        q, k, v, out_TD, lse_HT, batch.start_T, x_TC.stride(0), out_TD.stride(0), shape.scale, shape.window or 0,
        tokens, **_constants(shape, 3),
    )  # fmt: skip
    return lse_HT


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Any, batch: DeviceBatch, shape: AttentionShape, dx_TC: Tensor
) -> None:
    if library_attention.applies(x_TC, batch):
        library_attention.attention_backward(dout_TD, x_TC, out_TD, saved, batch, shape, dx_TC)
        return
    tokens = x_TC.shape[0]
    tiles = triton.cdiv(tokens, ROWS)
    (q, k, v), (dq, dk, dv) = shape.split_qkv(x_TC), shape.split_qkv(dx_TC)
    delta_HT = torch.empty_like(saved)
    x_stride, dout_stride, dx_stride = x_TC.stride(0), dout_TD.stride(0), dx_TC.stride(0)
    fixed = (shape.scale, shape.window or 0, tokens)
    _backward_queries[(tiles, shape.heads)](
        q, k, v, out_TD, dout_TD, dq, saved, delta_HT, batch.start_T, x_stride, out_TD.stride(0), dout_stride,
        dx_stride, *fixed, **_constants(shape, 2),
    )  # fmt: skip
    programs = tiles * shape.kv_heads
    shares = 2 if programs <= PROGRAMS and shape.heads // shape.kv_heads % 2 == 0 else 1
    sums, arrived = delta_HT, batch.start_T  # neither is read where nothing is shared
    if shares == 2:
        sums = delta_HT.new_empty(programs * 4 * ROWS * shape.head_dim)
        arrived = torch.zeros(programs, dtype=torch.int32, device=x_TC.device)
    _backward_keys[(tiles, shape.kv_heads, shares)](
        q, k, v, dout_TD, dk, dv, saved, delta_HT, batch.start_T, batch.end_T, sums, arrived, x_stride, dout_stride,
        dx_stride, *fixed, **_constants(shape, 1), SHARES=shares,
    )  # fmt: skip
