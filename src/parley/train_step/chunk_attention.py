"""Attention of one rank's chunk of a row that is split over ranks (context_parallel.py): three ways, one result.

A chunk inside one document takes two blocks: the keys before the chunk, which all of its queries see, and the chunk's
own, causally. Each block is a call of cuDNN's attention, and the log-sum-exps of both give the weights of their outputs
(Milakov and Gimelshein, arXiv 1805.02867; between ranks: Ring Attention, arXiv 2310.01889). The backward operator is
given output and log-sum-exp of the whole, from which it computes the gradient of its block's share. Chunks of several
documents, and what cuDNN's operator does not take, go to flash-attention 2; float32 and the CPU to plain PyTorch.

Shape suffixes (legend in docs/design.md): H query heads, G key-value heads, E head size. Here only: t queries of the
chunk, L keys from the first query's document on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from parley.library_compat.torch import (
    cudnn_attention,
    cudnn_attention_backward,
    varlen_flash_attention,
    varlen_flash_attention_backward,
)
from parley.train_step.long_documents import LONG_DOCUMENT
from parley.train_step.ops import AttentionShape

MAX_CUDNN_HEAD = 128


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

    @property
    def before(self) -> int:
        """Keys before the chunk's own."""
        return self.key_edges[-1] - self.query_edges[-1]


def attend(q_tHE: Tensor, kv_L2GE: Tensor, chunk: Chunk, shape: AttentionShape) -> Tensor:
    """Causal attention of a chunk's queries inside their documents, (t, H, E). `shape` has no soft cap."""
    if not q_tHE.is_cuda or q_tHE.dtype == torch.float32:
        return reference_chunk(q_tHE, kv_L2GE, chunk, shape)
    if takes_blocks(chunk, shape):
        return BlockChunk.apply(q_tHE, kv_L2GE, chunk.before, shape.scale)
    return FlashChunk.apply(q_tHE, kv_L2GE, chunk, shape)


def takes_blocks(chunk: Chunk, shape: AttentionShape) -> bool:
    """Whether a chunk goes to cuDNN: inside one document, long, and with keys of a length that other chunks have, too.

    cuDNN's operator has no window, and its backward pass adds in no fixed order.
    """
    queries = chunk.query_edges[-1]
    return (
        len(chunk.query_edges) == 2
        and queries >= LONG_DOCUMENT
        and chunk.before % queries == 0
        and shape.window is None
        and shape.head_dim <= MAX_CUDNN_HEAD
        and shape.head_dim % 8 == 0
        and not torch.are_deterministic_algorithms_enabled()
    )


class BlockChunk(torch.autograd.Function):
    """A chunk inside one document: a full block of `before` keys, and a causal one of its own."""

    @staticmethod
    def forward(ctx: Any, q_tHE: Tensor, kv_L2GE: Tensor, before: int, scale: float) -> Tensor:
        q = _heads_first(q_tHE)
        out, lse, *ctx.own = _block(q, kv_L2GE[before:], scale, causal=True)
        if before:
            earlier, earlier_lse, *ctx.earlier = _block(q, kv_L2GE[:before], scale, causal=False)
            share = torch.sigmoid(earlier_lse - lse)
            out = (out + share * (earlier - out)).to(out.dtype)
            lse = torch.logaddexp(lse, earlier_lse)
        ctx.before, ctx.scale = before, scale
        ctx.save_for_backward(q_tHE, kv_L2GE, out, lse)
        return out[0].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q_tHE, kv_L2GE, out, lse = ctx.saved_tensors
        before, q, dout = ctx.before, _heads_first(q_tHE), _heads_first(gradients[0])
        dkv_L2GE = torch.empty_like(kv_L2GE)

        def add_block(keys: slice, state: list[Any], *, causal: bool) -> Tensor:
            k, v = (_heads_first(part) for part in kv_L2GE[keys].chunk(2, dim=1))
            dq, *dkv = cudnn_attention_backward(dout, q, k, v, out, [lse, *state], ctx.scale, causal=causal)
            for own, part in zip(dkv_L2GE[keys].chunk(2, dim=1), dkv, strict=True):
                own.copy_(part[0].transpose(0, 1))
            return dq[0].transpose(0, 1)

        dq_tHE = add_block(slice(before, None), ctx.own, causal=True)
        if before:
            dq_tHE = dq_tHE + add_block(slice(before), ctx.earlier, causal=False)
        return dq_tHE, dkv_L2GE, None, None


def _block(q_1HtE: Tensor, kv_L2GE: Tensor, scale: float, *, causal: bool) -> list[Any]:
    """Output (1, H, t, E), log-sum-exp (1, H, t, 1), and what else the backward operator reads."""
    k, v = (_heads_first(part) for part in kv_L2GE.chunk(2, dim=1))
    out, state = cudnn_attention(q_1HtE, k, v, scale, causal=causal)
    return [out, *state]


def _heads_first(x_tHE: Tensor) -> Tensor:
    """As the operators of cuDNN take it, (1, H, t, E), contiguous."""
    return x_tHE.transpose(0, 1)[None].contiguous()


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
    out, device = [], q_tHE.device
    for i in range(len(chunk.query_edges) - 1):
        q_HLE = q_tHE[chunk.query_edges[i] : chunk.query_edges[i + 1]].transpose(0, 1)
        k_GLE, v_GLE = kv_L2GE[chunk.key_edges[i] : chunk.key_edges[i + 1]].transpose(0, 1).chunk(2)
        queries, keys = q_HLE.shape[1], k_GLE.shape[1]
        position_L = torch.arange(keys - queries, keys, device=device)[:, None]
        key_L = torch.arange(keys, device=device)
        seen_LL = key_L <= position_L
        if shape.window is not None:
            seen_LL &= key_L > position_L - shape.window
        attended = scaled_dot_product_attention(
            q_HLE[None], k_GLE[None], v_GLE[None], attn_mask=seen_LL, scale=shape.scale, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)
