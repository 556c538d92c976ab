"""Causal attention over packed documents in plain PyTorch.

Documents become rows of a grid as wide as the longest. What stands behind a short one does not matter: a causal query
never sees it, and the gradients that come back for it are nothing.

Shape suffixes: T tokens, C query, key and value columns side by side, D = H E columns of queries, H heads, K key-value
heads, G = H / K query heads to a key-value head, E head size, N documents, L the longest, I = N L places of the grid,
B = N K products of a batch, Q = G L queries of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parley.engine.documents import Grid, Rows
from parley.engine.ops import AttentionShape

aten = torch.ops.aten
SHORT = 128  # up to so many tokens whole score matrices are quicker than the flash operation: 2.1x at 52, 0.6x at 256


def attention(x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> Any:
    grid = rows.grid
    x_IC = x_TC.index_select(0, grid.token_I)
    if grid.longest <= SHORT:
        q_BQE, k_BLE, v_BLE = (_fold(part, grid, shape.kv_heads) for part in shape.parts(x_IC))
        mask_QL = _mask(grid.longest, shape, x_TC).repeat(shape.heads // shape.kv_heads, 1)
        p_BQL = torch.baddbmm(mask_QL, q_BQE, k_BLE.mT, alpha=shape.scale).softmax(-1)
        out_ID, saved = _unfold(p_BQL @ v_BLE, grid, shape.kv_heads), p_BQL
    else:
        q, k, v = _heads(x_IC, grid, shape)
        out_NHLE, saved = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, **_flash_mask(grid, shape, q))
        out_ID = out_NHLE.transpose(1, 2).reshape(len(x_IC), -1)
    out_TD.copy_(out_ID.index_select(0, grid.place_T))
    return saved


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Any, rows: Rows, shape: AttentionShape, dx_TC: Tensor
) -> None:
    grid = rows.grid
    x_IC = x_TC.index_select(0, grid.token_I)
    dout_ID = dout_TD.new_zeros(len(x_IC), dout_TD.shape[1]).index_copy_(0, grid.place_T, dout_TD)
    if grid.longest <= SHORT:
        parts = _short_backward(dout_ID, x_IC, saved, grid, shape)
    else:
        out_ID = out_TD.index_select(0, grid.token_I)
        parts = _long_backward(dout_ID, x_IC, out_ID, saved, grid, shape)
    dx_TC.copy_(torch.cat(parts, dim=1).index_select(0, grid.place_T))


def _short_backward(
    dout_ID: Tensor, x_IC: Tensor, p_BQL: Tensor, grid: Grid, shape: AttentionShape
) -> tuple[Tensor, ...]:
    q_BQE, k_BLE, v_BLE = (_fold(part, grid, shape.kv_heads) for part in shape.parts(x_IC))
    dout_BQE = _fold(dout_ID.unflatten(1, (-1, shape.size)), grid, shape.kv_heads)
    ds_BQL = aten._softmax_backward_data(dout_BQE @ v_BLE.mT, p_BQL, -1, p_BQL.dtype).mul_(shape.scale)
    grads = (ds_BQL @ k_BLE, ds_BQL.mT @ q_BQE, p_BQL.mT @ dout_BQE)
    return tuple(_unfold(grad, grid, shape.kv_heads) for grad in grads)


def _long_backward(
    dout_ID: Tensor, x_IC: Tensor, out_ID: Tensor, lse: Tensor, grid: Grid, shape: AttentionShape
) -> tuple[Tensor, ...]:
    q, k, v = _heads(x_IC, grid, shape)
    out, dout = (x.view(grid.documents, grid.longest, shape.heads, -1).transpose(1, 2) for x in (out_ID, dout_ID))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, **_flash_mask(grid, shape, q)
    )
    dq, dk, dv = (grad.transpose(1, 2).reshape(len(x_IC), shape.kv_heads, -1, shape.size) for grad in grads)
    return dq.flatten(1), dk.sum(2).flatten(1), dv.sum(2).flatten(1)


def _fold(x_IHE: Tensor, grid: Grid, kv_heads: int) -> Tensor:
    """(N K, G L, E): the queries that share a key-value head stand in one matrix, so that no key is repeated."""
    x_NLKGE = x_IHE.unflatten(1, (kv_heads, -1)).unflatten(0, (grid.documents, grid.longest))
    return x_NLKGE.permute(0, 2, 3, 1, 4).reshape(grid.documents * kv_heads, -1, x_IHE.shape[-1])


def _unfold(x_BQE: Tensor, grid: Grid, kv_heads: int) -> Tensor:
    """Back to (N L, K G E)."""
    x_NKGLE = x_BQE.view(grid.documents, kv_heads, -1, grid.longest, x_BQE.shape[-1])
    return x_NKGLE.permute(0, 3, 1, 2, 4).reshape(grid.documents * grid.longest, -1)


def _heads(x_IC: Tensor, grid: Grid, shape: AttentionShape) -> tuple[Tensor, ...]:
    """Queries, keys and values as (N, H, L, E), keys and values repeated for every query head."""
    q, k, v = shape.parts(x_IC)
    group = shape.heads // shape.kv_heads
    parts = (q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))
    return tuple(part.unflatten(0, (grid.documents, grid.longest)).transpose(1, 2) for part in parts)


def _mask(longest: int, shape: AttentionShape, like: Tensor) -> Tensor:
    """(L, L): nothing where a query may look, minus infinity elsewhere."""
    hidden_LL = torch.ones(longest, longest, dtype=torch.bool, device=like.device).triu(1)
    if shape.window is not None:
        hidden_LL |= torch.ones_like(hidden_LL).tril(-shape.window)
    return torch.zeros(longest, longest, dtype=like.dtype, device=like.device).masked_fill(hidden_LL, -torch.inf)


def _flash_mask(grid: Grid, shape: AttentionShape, like: Tensor) -> dict[str, Any]:
    if shape.window is None or shape.window >= grid.longest:
        return {"is_causal": True, "attn_mask": None, "scale": shape.scale}
    return {"is_causal": False, "attn_mask": _mask(grid.longest, shape, like)[None, None], "scale": shape.scale}
