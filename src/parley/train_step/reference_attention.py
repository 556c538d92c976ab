"""Causal attention over packed documents in plain PyTorch.

Documents become rows of a grid as wide as the longest. What stands behind a short one does not matter: a causal query
never sees it, and the gradients that come back for it are nothing.

Shape suffixes: T tokens, C query, key and value columns side by side, D = H E columns of queries, H heads, K key-value
heads, W = H + 2K, G = H / K query heads to a key-value head, E head size, N documents, L the longest, J = N L W places
of the grid (all queries, then all keys, then all values), B = N K products of a batch, Q = G L queries of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import Rows

aten = torch.ops.aten
SHORT = 128  # up to so many tokens whole score matrices are quicker than the flash operation: 2.1x at 52, 0.6x at 256


@dataclass(frozen=True)
class Grid:
    """Where everything stands. `head_J`: the row of the pack's heads (T W, E) that is in each place of the grid

    (behind a short document, its last token over again); `place_TW`: the place of each head of each token.
    """

    documents: int
    longest: int
    shape: AttentionShape
    head_J: Tensor
    place_TW: Tensor

    @property
    def queries(self) -> int:
        """Places that hold a query."""
        return self.documents * self.longest * self.shape.heads

    def lay(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N K, G L, E), keys and values (N K, L, E): no key is repeated for the queries that share it."""
        return self.parts(x_TC.reshape(-1, self.shape.size).index_select(0, self.head_J))

    def parts(self, x_JE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, size = self.documents * self.longest * self.shape.kv_heads, self.shape.size
        q_BQE, k_BLE, v_BLE = (
            part.view(self.documents * self.shape.kv_heads, -1, size) for part in x_JE.split([self.queries, keys, keys])
        )
        return q_BQE, k_BLE, v_BLE

    def lay_outputs(self, x_TD: Tensor) -> Tensor:
        """(N K, G L, E), with nothing behind a short document."""
        place_I, size = self.place_TW[:, : self.shape.heads].flatten(), self.shape.size
        x_THE = x_TD[: len(self.place_TW)].reshape(-1, size)
        room_IE = x_TD.new_zeros(self.queries, size).index_copy_(0, place_I, x_THE)
        return room_IE.view(self.documents * self.shape.kv_heads, -1, size)

    def gather(self, x_JE: Tensor, out_TC: Tensor) -> None:
        """Write the heads of each token side by side into `out_TC`, and nothing into rows that are no token's."""
        tokens, wide = len(self.place_TW), out_TC.shape[1] // self.shape.size
        out_TC[:tokens] = x_JE.index_select(0, self.place_TW[:, :wide].flatten()).view(tokens, -1)
        out_TC[tokens:].zero_()


@lru_cache(maxsize=4)
def grid_of(lengths: tuple[int, ...], shape: AttentionShape) -> Grid:
    """Worked out once for all layers of a pass."""
    longest, heads, kv_heads = max(lengths), shape.heads, shape.kv_heads
    wide = heads + 2 * kv_heads
    length_N = torch.tensor(lengths)
    start_N = length_N.cumsum(0) - length_N
    column_L = torch.arange(longest)
    token_N1L = (start_N[:, None] + column_L.minimum(length_N[:, None] - 1))[:, None]
    ranges = (torch.arange(heads), torch.arange(heads, heads + kv_heads), torch.arange(heads + kv_heads, wide))
    head_J = torch.cat([(token_N1L * wide + range_H[:, None]).flatten() for range_H in ranges])
    places = torch.arange(len(head_J)).split([len(lengths) * longest * len(range_H) for range_H in ranges])
    place_NLW = torch.cat([p.view(len(lengths), -1, longest).transpose(1, 2) for p in places], dim=2)
    return Grid(len(lengths), longest, shape, head_J, place_NLW[column_L < length_N[:, None]])


def attention(x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> Any:
    assert rows.lengths is not None, "only a CUDA graph hides them"
    grid = grid_of(rows.lengths, shape)
    q_BQE, k_BLE, v_BLE = grid.lay(x_TC)
    if grid.longest <= SHORT:
        p_BQL = torch.baddbmm(_mask(grid.longest, shape, x_TC), q_BQE, k_BLE.mT, alpha=shape.scale).softmax(-1)
        grid.gather((p_BQL @ v_BLE).view(-1, shape.size), out_TD)
        return p_BQL
    q, k, v = _heads(grid, q_BQE, k_BLE, v_BLE)
    out_NHLE, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, **_flash_mask(grid, q))
    grid.gather(out_NHLE.reshape(-1, shape.size), out_TD)
    return lse


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Any, rows: Rows, shape: AttentionShape, dx_TC: Tensor
) -> None:
    assert rows.lengths is not None, "only a CUDA graph hides them"
    grid = grid_of(rows.lengths, shape)
    parts = grid.lay(x_TC)
    dout_BQE = grid.lay_outputs(dout_TD)
    dx_JE = x_TC.new_empty(len(grid.head_J), shape.size)
    if grid.longest <= SHORT:
        _short_backward(dout_BQE, *parts, saved, shape.scale, *grid.parts(dx_JE))
    else:
        _long_backward(dout_BQE, parts, grid.lay_outputs(out_TD), saved, grid, dx_JE)
    grid.gather(dx_JE, dx_TC)


def _short_backward(
    dout_BQE: Tensor, q_BQE: Tensor, k_BLE: Tensor, v_BLE: Tensor, p_BQL: Tensor, scale: float,
    dq_BQE: Tensor, dk_BLE: Tensor, dv_BLE: Tensor,
) -> None:  # fmt: skip
    ds_BQL = aten._softmax_backward_data(dout_BQE @ v_BLE.mT, p_BQL, -1, p_BQL.dtype)
    dq_BQE.baddbmm_(ds_BQL, k_BLE, beta=0, alpha=scale)
    dk_BLE.baddbmm_(ds_BQL.mT, q_BQE, beta=0, alpha=scale)
    torch.bmm(p_BQL.mT, dout_BQE, out=dv_BLE)


def _long_backward(
    dout_BQE: Tensor, parts: tuple[Tensor, Tensor, Tensor], out_BQE: Tensor, lse: Tensor, grid: Grid, dx_JE: Tensor
) -> None:
    q, k, v = _heads(grid, *parts)
    out, dout = (x_BQE.view(q.shape) for x_BQE in (out_BQE, dout_BQE))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, **_flash_mask(grid, q)
    )
    dq_BQE, dk_BLE, dv_BLE = grid.parts(dx_JE)
    dq_BQE.copy_(dq.reshape(dq_BQE.shape))
    for dx_BLE, dx_NHLE in ((dk_BLE, dk), (dv_BLE, dv)):
        torch.sum(dx_NHLE.reshape(len(dx_BLE), -1, *dx_BLE.shape[1:]), 1, out=dx_BLE)


def _heads(grid: Grid, q_BQE: Tensor, k_BLE: Tensor, v_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as (N, H, L, E), keys and values repeated for every query head."""
    shape = grid.shape
    whole = (grid.documents, shape.heads, grid.longest, shape.size)
    k, v = (x_BLE.repeat_interleave(shape.heads // shape.kv_heads, dim=0).view(whole) for x_BLE in (k_BLE, v_BLE))
    return q_BQE.view(whole), k, v


@lru_cache(maxsize=4)
def _score_mask(longest: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(G L, L): nothing where a query may look, minus infinity elsewhere."""
    hidden_LL = torch.ones(longest, longest, dtype=torch.bool).triu(1)
    if window is not None:
        hidden_LL |= torch.ones_like(hidden_LL).tril(-window)
    return torch.zeros(longest, longest, dtype=dtype).masked_fill(hidden_LL, -torch.inf).repeat(group, 1)


def _mask(longest: int, shape: AttentionShape, like: Tensor) -> Tensor:
    return _score_mask(longest, shape.heads // shape.kv_heads, shape.window, like.dtype)


def _flash_mask(grid: Grid, like: Tensor) -> dict[str, Any]:
    shape = grid.shape
    if shape.window is None or shape.window >= grid.longest:
        return {"is_causal": True, "attn_mask": None, "scale": shape.scale}
    mask_LL = _score_mask(grid.longest, 1, shape.window, like.dtype)
    return {"is_causal": False, "attn_mask": mask_LL[None, None], "scale": shape.scale}
