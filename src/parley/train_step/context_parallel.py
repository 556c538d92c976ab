"""Context parallelism: the tokens of one packed row split over ranks, for conversations beyond one card.

A row of T tokens is cut into 2 N chunks, and rank r of N holds chunks r and 2 N - 1 - r: a causal query of a late chunk
has more keys, and so each rank has as many pairs of query and key. Everything but attention works token by token.
Each attention layer gathers keys and values of all ranks and computes its own queries; in the backward pass the
gradients of keys and values are summed over ranks and scattered. This is the all-gather variant of Llama 3's training
(arXiv 2407.21783, section 3.3.2): with grouped queries keys and values are small, and document masks stay simple.

torch.distributed.tensor.experimental.context_parallel splits plain causal sequences: it takes no document boundaries.

Shape suffixes (legend in docs/design.md): T tokens of the whole row, H query heads, G key-value heads, E head size,
S supervised rows. Here only: t tokens of this rank, c those of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from parley.data.control_tokens import IGNORE_INDEX
from parley.library_compat.torch import varlen_flash_attention, varlen_flash_attention_backward
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import PackedBatch
from parley.units import round_up


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that a row is split over, this one among them. `group`: of torch.distributed; None for all ranks."""

    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one rank, and the keys that they see, which begin with the first query's document.

    `query_edges`, `key_edges`: where the documents begin among queries and keys, and the end of the last; the last
    query of each document sees its last key here.
    """

    queries: slice  # of this rank's tokens
    keys: slice  # of the whole row
    query_edges: tuple[int, ...]
    key_edges: tuple[int, ...]


@dataclass(frozen=True)
class ContextLayout:
    """How a row lies on the ranks of `group`: the two chunks of this one."""

    group: ContextGroup
    chunks: tuple[Chunk, Chunk]


def split(packed: PackedBatch, group: ContextGroup) -> tuple[PackedBatch, ContextLayout]:
    """This rank's tokens of a row, which is padded to chunks of one size, and their supervised rows.

    A rank without a supervised row gets one that is ignored, as every rank runs the head.
    """
    size = round_up(len(packed.ids_T), 2 * group.ranks)
    packed = packed.padded(size)
    length = size // (2 * group.ranks)
    starts = (group.rank * length, (2 * group.ranks - 1 - group.rank) * length)
    own_t = np.concatenate([np.arange(start, start + length) for start in starts])
    local_T = np.full(size, -1, dtype=np.int32)
    local_T[own_t] = np.arange(len(own_t))
    own_S = local_T[packed.row_S] >= 0
    row_S, target_S = local_T[packed.row_S[own_S]], packed.target_S[own_S]
    weight_S = None if packed.weight_S is None else packed.weight_S[own_S]
    if not len(row_S):
        row_S, target_S = np.zeros(1, dtype=np.int32), np.full(1, IGNORE_INDEX, dtype=np.int32)
        weight_S = None if weight_S is None else np.zeros(1, dtype=np.float32)
    local = replace(
        packed, ids_T=packed.ids_T[own_t], position_T=packed.position_T[own_t], start_T=packed.start_T[own_t],
        end_T=packed.end_T[own_t], row_S=row_S, target_S=target_S, weight_S=weight_S,
    )  # fmt: skip
    edges = np.concatenate([[0], np.cumsum(packed.lengths)])
    first, second = (_chunk(index * length, start, start + length, edges) for index, start in enumerate(starts))
    return local, ContextLayout(group, (first, second))


def _chunk(offset: int, start: int, stop: int, edges: np.ndarray) -> Chunk:
    """Tokens [start, stop) of the row, which are those of this rank from `offset` on."""
    inside = edges[(edges > start) & (edges < stop)].tolist()
    first_key = int(edges[edges <= start].max())
    return Chunk(
        slice(offset, offset + stop - start),
        slice(first_key, stop),
        tuple(edge - start for edge in (start, *inside, stop)),
        tuple(edge - first_key for edge in (first_key, *inside, stop)),
    )


def context_attention(
    q_HtE: Tensor, k_GtE: Tensor, v_GtE: Tensor, layout: ContextLayout, shape: AttentionShape
) -> Tensor:
    """Causal attention of this rank's queries inside their documents, (t, H E). `shape` has no soft cap."""
    kv_t2GE = torch.cat([k_GtE.transpose(0, 1), v_GtE.transpose(0, 1)], dim=1)
    kv_T2GE = GatherTokens.apply(kv_t2GE, layout.group)
    attend = FlashChunk.apply if q_HtE.is_cuda else reference_chunk
    out = [attend(q_HtE.transpose(0, 1)[chunk.queries], kv_T2GE[chunk.keys], chunk, shape) for chunk in layout.chunks]
    return torch.cat(out).flatten(1)


class GatherTokens(torch.autograd.Function):
    """(t, ...) of each rank to (T, ...) in the order of the row. Backward: the sum over ranks, scattered."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        gathered = x_t.new_empty(group.ranks, *x_t.shape)
        dist.all_gather(list(gathered.unbind()), x_t.contiguous(), group=group.group)
        early, late = gathered.unflatten(1, (2, -1)).unbind(1)  # (N, c, ...) each
        return torch.cat([early, late.flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ranks = ctx.group.ranks
        early, late = gradients[0].unflatten(0, (2, ranks, -1)).unbind()
        parts = torch.stack([early, late.flip(0)], dim=1).flatten(1, 2)  # (N, t, ...)
        own_t = torch.empty_like(parts[0])
        dist.reduce_scatter(own_t, list(parts.contiguous().unbind()), group=ctx.group.group)
        return own_t, None


class FlashChunk(torch.autograd.Function):
    """Flash-attention 2 of a chunk's documents. Its causal mask ends with the last query at the last key."""

    @staticmethod
    def forward(ctx: Any, q_tHE: Tensor, kv_L2GE: Tensor, chunk: Chunk, shape: AttentionShape) -> Tensor:
        ctx.edges = [
            torch.tensor(edges, dtype=torch.int32).to(q_tHE.device, non_blocking=True)
            for edges in (chunk.query_edges, chunk.key_edges)
        ]
        ctx.longest = [int(np.diff(edges).max()) for edges in (chunk.query_edges, chunk.key_edges)]
        ctx.shape = shape
        k_LGE, v_LGE = kv_L2GE.chunk(2, dim=1)
        out_tHE, lse = varlen_flash_attention(
            q_tHE, k_LGE, v_LGE, ctx.edges[0], ctx.longest[0], shape.scale, shape.window, ctx.edges[1], ctx.longest[1]
        )
        ctx.save_for_backward(q_tHE, kv_L2GE, out_tHE, lse)
        return out_tHE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q_tHE, kv_L2GE, out_tHE, lse = ctx.saved_tensors
        k_LGE, v_LGE = kv_L2GE.chunk(2, dim=1)
        dq_tHE, dk_LGE, dv_LGE = varlen_flash_attention_backward(
            gradients[0].contiguous(), q_tHE, k_LGE, v_LGE, out_tHE, lse, ctx.edges[0], ctx.longest[0],
            ctx.shape.scale, ctx.shape.window, ctx.edges[1], ctx.longest[1],
        )  # fmt: skip
        return dq_tHE, torch.cat([dk_LGE, dv_LGE], dim=1), None, None


def reference_chunk(q_tHE: Tensor, kv_L2GE: Tensor, chunk: Chunk, shape: AttentionShape) -> Tensor:
    """The same in plain PyTorch, document by document, with a mask of each."""
    out = []
    for i in range(len(chunk.query_edges) - 1):
        q_HLE = q_tHE[chunk.query_edges[i] : chunk.query_edges[i + 1]].transpose(0, 1)
        k_GLE, v_GLE = kv_L2GE[chunk.key_edges[i] : chunk.key_edges[i + 1]].transpose(0, 1).chunk(2)
        queries, keys = q_HLE.shape[1], k_GLE.shape[1]
        position_L = torch.arange(keys - queries, keys)[:, None]
        seen_LL = torch.arange(keys) <= position_L
        if shape.window is not None:
            seen_LL &= torch.arange(keys) > position_L - shape.window
        attended = scaled_dot_product_attention(
            q_HLE[None], k_GLE[None], v_GLE[None], attn_mask=seen_LL, scale=shape.scale, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)
