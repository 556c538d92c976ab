"""Causal attention inside the documents of a packed row, with grouped-query heads, forward and backward.

FlashAttention-2 (arXiv 2307.08691): one program per tile of queries (forward, dQ) or of keys (dK and dV), online
softmax in base 2, and the log-sum-exp saved for the backward pass. Queries, keys and values are read in place from
fused rows x_TC. A tile of queries begins at the first row of the document that its first query belongs to, so that no
work is launched for pairs in different documents. Only `start_T` and `end_T` know the documents, so that a CUDA graph
can be replayed for others. Programs write disjoint tiles; only dK and dV of a key tile may be shared by two programs
(split_reduction.py). Where the host knows the documents too, long ones go to library_attention.py.

Shape suffixes (legend in docs/design.md): T tokens, D query columns (H E), C query, key and value columns, H query
heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels import library_attention
from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.split_reduction import FULL_OCCUPANCY, is_last_to_arrive
from parley.train_step.kernels.tanh import tanh
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-1.0e6)  # finite: a tile that a query sees nothing of must not become NaN


@triton.jit
def _in_head(e, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which columns of a tile a head has; known to the compiler where it has all of them."""
    if E == BLOCK_E:
        return tl.full(e.shape, 1, tl.int1)
    return e < E


@triton.jit
def _capped(s, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2(e), and the derivative of the soft cap there."""
    slope = tl.full(s.shape, 1.0, tl.float32)
    if SOFTCAP:  # one return: the compiler wants the same types of every return, also of those it cannot reach
        t = tanh(s / softcap)
        s = t * softcap
        slope = 1.0 - t * t
    return s * LOG2_E, slope


@triton.jit
def _visible(query, key, first, window, WINDOW: tl.constexpr):
    visible = (key >= first) & (key <= query)
    if WINDOW:
        visible = visible & (key > query - window)
    return visible


@kernel("T")
def _forward(
    q, k, v, out, lse, start, x_stride, out_stride, scale, window, softcap, T,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    in_head = _in_head(e, E, BLOCK_E)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_at = row.to(tl.int64)[:, None]
    inside = row < T
    first = tl.load(start + row, mask=inside, other=T)
    query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=inside[:, None] & in_head, other=0.0)
    k += (head // GROUP) * E
    v += (head // GROUP) * E
    m = tl.full((BLOCK_Q,), MASKED, tl.float32)
    denom = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    from_key = tl.min(first, axis=0)
    if WINDOW:
        from_key = tl.maximum(from_key, tile * BLOCK_Q - window + 1)
    for begin in range(from_key // BLOCK_K * BLOCK_K, tl.minimum((tile + 1) * BLOCK_Q, T), BLOCK_K):
        col = begin + tl.arange(0, BLOCK_K)
        col_at = col.to(tl.int64)[:, None] * x_stride + e[None, :]
        key = tl.load(k + col_at, mask=(col[:, None] < T) & in_head, other=0.0)
        s, _ = _capped(tl.dot(query, tl.trans(key), input_precision="ieee") * scale, softcap, SOFTCAP)
        s = tl.where(_visible(row[:, None], col[None, :], first[:, None], window, WINDOW), s, MASKED)
        new_m = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - new_m[:, None])
        rescale = tl.exp2(m - new_m)
        denom = denom * rescale + tl.sum(p, axis=1)
        value = tl.load(v + col_at, mask=(col[:, None] < T) & in_head, other=0.0)
        acc = tl.dot(p.to(value.dtype), value, acc * rescale[:, None], input_precision="ieee")
        m = new_m
    acc = acc / denom[:, None]
    tl.store(
        out + row_at * out_stride + head * E + e[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & in_head
    )
    tl.store(lse + head * T + row, m + tl.log2(denom), mask=inside)


@kernel()
def _backward_queries(
    q, k, v, out, dout, dq, lse, delta, start, x_stride, out_stride, dout_stride, dx_stride, scale, window, softcap, T,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    in_head = _in_head(e, E, BLOCK_E)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_at = row.to(tl.int64)[:, None]
    inside = row < T
    in_row = inside[:, None] & in_head
    first = tl.load(start + row, mask=inside, other=T)
    query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=in_row, other=0.0)
    dout_tile = tl.load(dout + row_at * dout_stride + head * E + e[None, :], mask=in_row, other=0.0)
    out_tile = tl.load(out + row_at * out_stride + head * E + e[None, :], mask=in_row, other=0.0)
    delta_row = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), axis=1)
    tl.store(delta + head * T + row, delta_row, mask=inside)
    lse_row = tl.load(lse + head * T + row, mask=inside, other=0.0)
    k += (head // GROUP) * E
    v += (head // GROUP) * E
    dquery = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    from_key = tl.min(first, axis=0)
    if WINDOW:
        from_key = tl.maximum(from_key, tile * BLOCK_Q - window + 1)
    for begin in range(from_key // BLOCK_K * BLOCK_K, tl.minimum((tile + 1) * BLOCK_Q, T), BLOCK_K):
        col = begin + tl.arange(0, BLOCK_K)
        col_at = col.to(tl.int64)[:, None] * x_stride + e[None, :]
        key = tl.load(k + col_at, mask=(col[:, None] < T) & in_head, other=0.0)
        value = tl.load(v + col_at, mask=(col[:, None] < T) & in_head, other=0.0)
        s, slope = _capped(tl.dot(query, tl.trans(key), input_precision="ieee") * scale, softcap, SOFTCAP)
        visible = _visible(row[:, None], col[None, :], first[:, None], window, WINDOW)
        p = tl.where(visible, tl.exp2(s - lse_row[:, None]), 0.0)
        dp = tl.dot(dout_tile, tl.trans(value), input_precision="ieee")
        ds = p * (dp - delta_row[:, None]) * (scale * slope)
        dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision="ieee")
    tl.store(dq + row_at * dx_stride + head * E + e[None, :], dquery.to(dq.dtype.element_ty), mask=in_row)


@kernel()
def _backward_keys(
    q, k, v, dout, dk, dv, lse, delta, start, end, partials, arrivals, x_stride, dout_stride, dx_stride, scale,
    window, softcap, T,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, summed over the query heads of their group.

    With two SPLITS, two programs take half of the heads each (split_reduction.py). The last one adds the other's sum to
    its own registers: a + b is b + a, so that equal inputs give equal bits.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    e = tl.arange(0, BLOCK_E)
    in_head = _in_head(e, E, BLOCK_E)[None, :]
    col = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_at = col.to(tl.int64)[:, None]
    in_row = (col[:, None] < T) & in_head
    key = tl.load(k + col_at * x_stride + kv_head * E + e[None, :], mask=in_row, other=0.0)
    value = tl.load(v + col_at * x_stride + kv_head * E + e[None, :], mask=in_row, other=0.0)
    until = tl.max(tl.load(end + col, mask=col < T, other=0), axis=0)
    if WINDOW:
        until = tl.minimum(until, (tile + 1) * BLOCK_K - 1 + window)
    dkey = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    dvalue = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    for head_in_group in range(split * (GROUP // SPLITS), (split + 1) * (GROUP // SPLITS)):
        head = kv_head * GROUP + head_in_group
        for begin in range(tile * BLOCK_K // BLOCK_Q * BLOCK_Q, until, BLOCK_Q):
            row = begin + tl.arange(0, BLOCK_Q)
            row_at = row.to(tl.int64)[:, None]
            inside = row < T
            loaded = inside[:, None] & in_head
            query = tl.load(q + row_at * x_stride + head * E + e[None, :], mask=loaded, other=0.0)
            dout_tile = tl.load(dout + row_at * dout_stride + head * E + e[None, :], mask=loaded, other=0.0)
            first = tl.load(start + row, mask=inside, other=T)
            lse_row = tl.load(lse + head * T + row, mask=inside, other=0.0)
            delta_row = tl.load(delta + head * T + row, mask=inside, other=0.0)
            s, slope = _capped(tl.dot(key, tl.trans(query), input_precision="ieee") * scale, softcap, SOFTCAP)
            visible = _visible(row[None, :], col[:, None], first[None, :], window, WINDOW) & inside[None, :]
            p = tl.where(visible, tl.exp2(s - lse_row[None, :]), 0.0)
            dvalue = tl.dot(p.to(value.dtype), dout_tile, dvalue, input_precision="ieee")
            dp = tl.dot(value, tl.trans(dout_tile), input_precision="ieee")
            ds = p * (dp - delta_row[None, :]) * (scale * slope)
            dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision="ieee")
    last = True
    if SPLITS == 2:
        index = kv_head * tl.num_programs(0) + tile
        at = partials + index * (4 * BLOCK_K * BLOCK_E) + tl.arange(0, BLOCK_K)[:, None] * BLOCK_E + e[None, :]
        mine, other = at + split * (2 * BLOCK_K * BLOCK_E), at + (1 - split) * (2 * BLOCK_K * BLOCK_E)
        tl.store(mine, dkey)
        tl.store(mine + BLOCK_K * BLOCK_E, dvalue)
        last = is_last_to_arrive(arrivals + index, 2)
        if last:
            dkey += tl.load(other, cache_modifier=".cg")
            dvalue += tl.load(other + BLOCK_K * BLOCK_E, cache_modifier=".cg")
    if last:
        tl.store(dk + col_at * dx_stride + kv_head * E + e[None, :], dkey.to(dk.dtype.element_ty), mask=in_row)
        tl.store(dv + col_at * dx_stride + kv_head * E + e[None, :], dvalue.to(dv.dtype.element_ty), mask=in_row)


def _tile(shape: AttentionShape) -> int:
    """Queries and keys of a tile: fewer of wide heads, whose accumulators would not fit into registers."""
    return 64 if shape.head_dim <= 128 else 32


def _constants(shape: AttentionShape, stages: int) -> dict[str, int | bool]:
    """Stages as measured with heads of 64 and 128: a kernel with more accumulators has registers for fewer."""
    return {
        "GROUP": shape.heads // shape.kv_heads,
        "E": shape.head_dim,
        "BLOCK_E": triton.next_power_of_2(shape.head_dim),
        "WINDOW": shape.window is not None,
        "SOFTCAP": shape.softcap is not None,
        "BLOCK_Q": _tile(shape),
        "BLOCK_K": _tile(shape),
        "num_warps": 4,
        "num_stages": stages,
    }


def attention(
    x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor, sinks_H: Tensor | None = None
) -> Any:
    if sinks_H is None and library_attention.applies(x_TC, batch, shape):
        return library_attention.attention(x_TC, batch, shape, out_TD)
    tokens = x_TC.shape[0]
    q, k, v = shape.split_qkv(x_TC)
    lse_HT = torch.empty(shape.heads, tokens, dtype=torch.float32, device=x_TC.device)
    _forward[(triton.cdiv(tokens, _tile(shape)), shape.heads)](
        q, k, v, out_TD, lse_HT, batch.start_T, x_TC.stride(0), out_TD.stride(0), shape.scale, shape.window or 0,
        shape.softcap or 0.0, tokens, **_constants(shape, 3),
    )  # fmt: skip
    return lse_HT if sinks_H is None else _add_sinks(out_TD, lse_HT, sinks_H)


def _add_sinks(out_TD: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> Tensor:
    """Let each head's sink take its share of `out_TD`, in place; returns the log-sum-exp with it.

    The backward kernels read probabilities from the log-sum-exp, and a sink adds nothing to the sum of dout times out,
    so that they need not know of it.
    """
    with_sinks_HT = torch.logaddexp2(lse_HT, sinks_H.float()[:, None] * LOG2_E.value)
    share_TH1 = torch.exp2(lse_HT - with_sinks_HT).t()[:, :, None]
    out_TD.unflatten(1, (len(sinks_H), -1)).mul_(share_TH1)
    return with_sinks_HT


def sink_gradient(
    dout_TD: Tensor, out_TD: Tensor, saved: Any, sinks_H: Tensor, batch: DeviceBatch, shape: AttentionShape
) -> Tensor:
    """A sink's probability times the derivative of its score, which is minus dout times out: it has no value."""
    probability_TH = torch.exp2(sinks_H.float()[:, None] * LOG2_E.value - saved).t()
    dot_TH = (dout_TD.float() * out_TD).unflatten(1, (shape.heads, -1)).sum(-1)
    return -(probability_TH * dot_TH).sum(0)


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Any, batch: DeviceBatch, shape: AttentionShape, dx_TC: Tensor
) -> None:
    if isinstance(saved, list):  # of the libraries
        library_attention.attention_backward(dout_TD, x_TC, out_TD, saved, batch, shape, dx_TC)
        return
    tokens = x_TC.shape[0]
    tiles = triton.cdiv(tokens, _tile(shape))
    (q, k, v), (dq, dk, dv) = shape.split_qkv(x_TC), shape.split_qkv(dx_TC)
    delta_HT = torch.empty_like(saved)
    x_stride, dout_stride, dx_stride = x_TC.stride(0), dout_TD.stride(0), dx_TC.stride(0)
    fixed = (shape.scale, shape.window or 0, shape.softcap or 0.0, tokens)
    _backward_queries[(tiles, shape.heads)](
        q, k, v, out_TD, dout_TD, dq, saved, delta_HT, batch.start_T, x_stride, out_TD.stride(0), dout_stride,
        dx_stride, *fixed, **_constants(shape, 2),
    )  # fmt: skip
    programs = tiles * shape.kv_heads
    splits = 2 if programs <= FULL_OCCUPANCY and shape.heads // shape.kv_heads % 2 == 0 else 1
    partials, arrivals = delta_HT, batch.start_T  # placeholders: neither is read without splits
    if splits == 2:
        partials = delta_HT.new_empty(programs * 4 * _tile(shape) * triton.next_power_of_2(shape.head_dim))
        arrivals = torch.zeros(programs, dtype=torch.int32, device=x_TC.device)
    _backward_keys[(tiles, shape.kv_heads, splits)](
        q, k, v, dout_TD, dk, dv, saved, delta_HT, batch.start_T, batch.end_T, partials, arrivals, x_stride,
        dout_stride, dx_stride, *fixed, **_constants(shape, 1), SPLITS=splits,
    )  # fmt: skip
