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

from parley.data.control_tokens import IGNORE_INDEX
from parley.train_step.chunk_attention import Chunk, attend
from parley.train_step.long_documents import LONG_DOCUMENT
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
class ContextLayout:
    """How a row lies on the ranks of `group`: the two chunks of this one."""

    group: ContextGroup
    chunks: tuple[Chunk, Chunk]


def split(packed: PackedBatch, group: ContextGroup) -> tuple[PackedBatch, ContextLayout]:
    """This rank's tokens of a row, which is padded to chunks of one size, and their supervised rows.

    A rank without a supervised row gets one that is ignored, as every rank runs the head.
    """
    length = chunk_length(len(packed.ids_T), group.ranks)
    size = length * 2 * group.ranks
    # Causal attention of the last document does not see what lies behind it: padding counts as a part of it.
    edges = np.concatenate([[0], np.cumsum(packed.lengths)])
    edges[-1] = size
    packed = packed.padded(size)
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
    first, second = (_chunk(index * length, start, start + length, edges) for index, start in enumerate(starts))
    return local, ContextLayout(group, (first, second))


def chunk_length(tokens: int, ranks: int) -> int:
    """Tokens of a chunk of a row of so many. Long chunks have one of at most 32 lengths of each power of two: cuDNN's
    attention (chunk_attention.py) takes the host more than 100 ms for each new one.
    """
    length = -(-tokens // (2 * ranks))
    return length if length < LONG_DOCUMENT else round_up(length, 1 << (length.bit_length() - 6))


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
    q_tHE = q_HtE.transpose(0, 1)
    out = [attend(q_tHE[chunk.queries], kv_T2GE[chunk.keys], chunk, shape) for chunk in layout.chunks]
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
