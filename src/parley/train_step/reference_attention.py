"""Causal attention over packed documents in plain PyTorch.

Documents are padded to the longest: each becomes one entry of a batched product. A short document is padded with
copies of its last token. That changes nothing: a causal query never sees the keys after it, and the gradients of padded
queries are zero.

Shape suffixes (legend in docs/design.md): T tokens, C query, key and value columns, D = H E columns of queries, H query
heads, G key-value heads, E head size, N documents, L the longest. Here only: W = H + 2 G heads of a token,
J = N L W heads in the padded layout (all queries, then all keys, then all values), I = N L H of them queries,
B = N G batched products, Q = (H / G) L queries of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parley.library_compat.torch import cpu_flash_attention, cpu_flash_attention_backward, softmax_backward
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch

# Up to so many tokens full score matrices are faster than flash attention: 2.1x at 52 tokens, 0.6x at 256.
MAX_FULL_SCORES = 128


@dataclass(frozen=True)
class PaddedLayout:
    """Indices between the packed and the padded layout of one batch.

    `source_J`: for each head of the padded layout, its row among the packed heads (T W, E); padding repeats a
    document's last token. `target_TW`: for each head of each token, its row in the padded layout.
    """

    documents: int
    longest: int
    shape: AttentionShape
    source_J: Tensor
    target_TW: Tensor

    @property
    def queries(self) -> int:
        return self.documents * self.longest * self.shape.heads

    def pad(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N G, (H / G) L, E), keys and values (N G, L, E), keys not repeated."""
        return self.split(x_TC.reshape(-1, self.shape.head_dim).index_select(0, self.source_J))

    def split(self, x_JE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries, keys and values of a padded buffer, shaped as `pad` returns them."""
        keys, head_dim = self.documents * self.longest * self.shape.kv_heads, self.shape.head_dim
        q_BQE, k_BLE, v_BLE = (
            part.view(self.documents * self.shape.kv_heads, -1, head_dim)
            for part in x_JE.split([self.queries, keys, keys])
        )
        return q_BQE, k_BLE, v_BLE

    def pad_outputs(self, x_TD: Tensor) -> Tensor:
        """(N G, (H / G) L, E), with zeros at the padding."""
        target_I, head_dim = self.target_TW[:, : self.shape.heads].flatten(), self.shape.head_dim
        x_IE = x_TD[: len(self.target_TW)].reshape(-1, head_dim)
        padded_IE = x_TD.new_zeros(self.queries, head_dim).index_copy_(0, target_I, x_IE)
        return padded_IE.view(self.documents * self.shape.kv_heads, -1, head_dim)

    def unpad(self, x_JE: Tensor, out_TC: Tensor) -> None:
        """Write the heads of each token side by side into `out_TC`, and zeros into its padding rows."""
        tokens, heads = len(self.target_TW), out_TC.shape[1] // self.shape.head_dim
        out_TC[:tokens] = x_JE.index_select(0, self.target_TW[:, :heads].flatten()).view(tokens, -1)
        out_TC[tokens:].zero_()


@lru_cache(maxsize=4)
def padded_layout(lengths: tuple[int, ...], shape: AttentionShape) -> PaddedLayout:
    """Computed once for all layers of a pass."""
    longest, heads, kv_heads = max(lengths), shape.heads, shape.kv_heads
    all_heads = heads + 2 * kv_heads
    length_N = torch.tensor(lengths)
    start_N = length_N.cumsum(0) - length_N
    column_L = torch.arange(longest)
    token_N1L = (start_N[:, None] + column_L.minimum(length_N[:, None] - 1))[:, None]
    ranges = (torch.arange(heads), torch.arange(heads, heads + kv_heads), torch.arange(heads + kv_heads, all_heads))
    source_J = torch.cat([(token_N1L * all_heads + range_H[:, None]).flatten() for range_H in ranges])
    targets = torch.arange(len(source_J)).split([len(lengths) * longest * len(range_H) for range_H in ranges])
    target_NLW = torch.cat([t.view(len(lengths), -1, longest).transpose(1, 2) for t in targets], dim=2)
    return PaddedLayout(len(lengths), longest, shape, source_J, target_NLW[column_L < length_N[:, None]])


def attention(
    x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor, sinks_H: Tensor | None = None
) -> Any:
    assert batch.lengths is not None, "unknown to the host under a CUDA graph alone"
    layout = padded_layout(batch.lengths, shape)
    q_BQE, k_BLE, v_BLE = layout.pad(x_TC)
    if sinks_H is not None or _takes_full_scores(layout):
        # The query heads of a group are further rows of one product, so keys and values need not be repeated.
        p_BQL = _probabilities(_scores(q_BQE, k_BLE, shape, _mask(layout.longest, shape, x_TC)), layout, sinks_H)
        layout.unpad((p_BQL @ v_BLE).view(-1, shape.head_dim), out_TD)
        return p_BQL
    q, k, v = _repeat_kv(layout, q_BQE, k_BLE, v_BLE)
    out_NHLE, lse = cpu_flash_attention(q, k, v, **_flash_mask(layout, q))
    layout.unpad(out_NHLE.reshape(-1, shape.head_dim), out_TD)
    return lse


def attention_backward(
    dout_TD: Tensor,
    x_TC: Tensor,
    out_TD: Tensor,
    saved: Any,
    batch: DeviceBatch,
    shape: AttentionShape,
    dx_TC: Tensor,
) -> None:
    assert batch.lengths is not None, "unknown to the host under a CUDA graph alone"
    layout = padded_layout(batch.lengths, shape)
    qkv = layout.pad(x_TC)
    dout_BQE = layout.pad_outputs(dout_TD)
    dx_JE = x_TC.new_empty(len(layout.source_J), shape.head_dim)
    if saved.shape[1:] == (qkv[0].shape[1], layout.longest):  # probabilities, not a log-sum-exp
        _full_scores_backward(dout_BQE, *qkv, saved, shape, *layout.split(dx_JE))
    else:
        _flash_backward(dout_BQE, qkv, layout.pad_outputs(out_TD), saved, layout, dx_JE)
    layout.unpad(dx_JE, dx_TC)


def sink_gradient(
    dout_TD: Tensor, out_TD: Tensor, saved: Any, sinks_H: Tensor, batch: DeviceBatch, shape: AttentionShape
) -> Tensor:
    """A sink's probability times the derivative of its score, which is minus dout times out: it has no value."""
    assert batch.lengths is not None, "unknown to the host under a CUDA graph alone"
    layout = padded_layout(batch.lengths, shape)
    dot_BQ = (layout.pad_outputs(dout_TD).float() * layout.pad_outputs(out_TD)).sum(-1)
    gradient_BQ = (saved.float().sum(-1) - 1) * dot_BQ  # the other probabilities of a row are those of its keys
    return gradient_BQ.view(layout.documents, shape.heads, layout.longest).sum((0, 2))


def _takes_full_scores(layout: PaddedLayout) -> bool:
    """PyTorch's flash attention has no soft cap."""
    return layout.longest <= MAX_FULL_SCORES or layout.shape.softcap is not None


def _scores(q_BQE: Tensor, k_BLE: Tensor, shape: AttentionShape, mask: Tensor) -> Tensor:
    """(B, Q, L): scaled and capped, plus `mask`."""
    if shape.softcap is None:
        return torch.baddbmm(mask, q_BQE, k_BLE.mT, alpha=shape.scale)
    s_BQL = torch.bmm(q_BQE, k_BLE.mT).mul_(shape.scale / shape.softcap)
    return s_BQL.tanh_().mul_(shape.softcap).add_(mask)


def _probabilities(scores_BQL: Tensor, layout: PaddedLayout, sinks_H: Tensor | None) -> Tensor:
    if sinks_H is None:
        return scores_BQL.softmax(-1)
    sinks_BQ1 = sinks_H.to(scores_BQL.dtype).view(layout.shape.kv_heads, -1).repeat(layout.documents, 1)
    sinks_BQ1 = sinks_BQ1.repeat_interleave(layout.longest, dim=1)[..., None]
    return torch.cat([scores_BQL, sinks_BQ1], dim=-1).softmax(-1)[..., :-1]


def _full_scores_backward(
    dout_BQE: Tensor, q_BQE: Tensor, k_BLE: Tensor, v_BLE: Tensor, p_BQL: Tensor, shape: AttentionShape,
    dq_BQE: Tensor, dk_BLE: Tensor, dv_BLE: Tensor,
) -> None:  # fmt: skip
    ds_BQL = softmax_backward(dout_BQE @ v_BLE.mT, p_BQL)
    if shape.softcap is not None:  # the derivative of c tanh(s / c) is 1 - tanh^2(s / c)
        zero = ds_BQL.new_zeros(())
        ds_BQL.mul_(1 - (_scores(q_BQE, k_BLE, shape, zero) / shape.softcap).square())
    dq_BQE.baddbmm_(ds_BQL, k_BLE, beta=0, alpha=shape.scale)
    dk_BLE.baddbmm_(ds_BQL.mT, q_BQE, beta=0, alpha=shape.scale)
    torch.bmm(p_BQL.mT, dout_BQE, out=dv_BLE)


def _flash_backward(
    dout_BQE: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out_BQE: Tensor,
    lse: Tensor,
    layout: PaddedLayout,
    dx_JE: Tensor,
) -> None:
    q, k, v = _repeat_kv(layout, *qkv)
    out, dout = (x_BQE.view(q.shape) for x_BQE in (out_BQE, dout_BQE))
    dq, dk, dv = cpu_flash_attention_backward(dout, q, k, v, out, lse, **_flash_mask(layout, q))
    dq_BQE, dk_BLE, dv_BLE = layout.split(dx_JE)
    dq_BQE.copy_(dq.reshape(dq_BQE.shape))
    for dx_BLE, dx_NHLE in ((dk_BLE, dk), (dv_BLE, dv)):  # sum over the query heads that share a key-value head
        torch.sum(dx_NHLE.reshape(len(dx_BLE), -1, *dx_BLE.shape[1:]), 1, out=dx_BLE)


def _repeat_kv(layout: PaddedLayout, q_BQE: Tensor, k_BLE: Tensor, v_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as (N, H, L, E), keys and values repeated for every query head."""
    shape = layout.shape
    size = (layout.documents, shape.heads, layout.longest, shape.head_dim)
    k, v = (x_BLE.repeat_interleave(shape.heads // shape.kv_heads, dim=0).view(size) for x_BLE in (k_BLE, v_BLE))
    return q_BQE.view(size), k, v


@lru_cache(maxsize=4)
def _score_mask(longest: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(group L, L): zero where a query sees a key, minus infinity elsewhere."""
    hidden_LL = torch.ones(longest, longest, dtype=torch.bool).triu(1)
    if window is not None:
        hidden_LL |= torch.ones_like(hidden_LL).tril(-window)
    return torch.zeros(longest, longest, dtype=dtype).masked_fill(hidden_LL, -torch.inf).repeat(group, 1)


def _mask(longest: int, shape: AttentionShape, like: Tensor) -> Tensor:
    return _score_mask(longest, shape.heads // shape.kv_heads, shape.window, like.dtype)


def _flash_mask(layout: PaddedLayout, like: Tensor) -> dict[str, Any]:
    """The mask arguments of the flash operators: causal without a matrix unless a window hides something."""
    shape = layout.shape
    if shape.window is None or shape.window >= layout.longest:
        return {"is_causal": True, "mask": None, "scale": shape.scale}
    mask_LL = _score_mask(layout.longest, 1, shape.window, like.dtype)
    return {"is_causal": False, "mask": mask_LL[None, None], "scale": shape.scale}
