"""One decoder layer, forward and backward by hand, over a packed row.

Forward, with h the running sum of the residual stream:

    x   = h + what the layer before left to add        a   = attention(rope([q k v](norm x)))
    mid = x + o(a)                                     y   = down(silu(gate) * up),  [gate up](norm mid)

The sum mid + y is left to the next layer's norm, which reads both anyway. Every input of a product lives in a
buffer with spare columns for the adapters (see linear.py).

Shape suffixes: T tokens, D hidden, F feed-forward, C query, key and value columns, P spare columns for the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parley.engine.bind import Layer
from parley.engine.documents import Rows
from parley.engine.heads import normalise_heads, normalise_heads_backward
from parley.engine.linear import FusedLinear, Matrices
from parley.engine.ops import Ops, Rope


@dataclass(frozen=True)
class Context:
    """What all layers of a pass share."""

    ops: Ops
    matrices: Matrices
    rope: Rope
    rows: Rows


@dataclass
class Saved:
    """What the backward pass reads. Fields that a plan does not keep are None until `complete` computes them anew."""

    x_TD: Tensor
    normed_TDP: Tensor | None = None
    unturned_TC: Tensor | None = None  # before the head norms, for families that have them
    qkv_TC: Tensor | None = None
    attended_TDP: Tensor | None = None
    lse: Any = None
    mid_TD: Tensor | None = None
    mid_normed_TDP: Tensor | None = None
    gate_up_T2F: Tensor | None = None
    act_TFP: Tensor | None = None


ATTENTION = frozenset({"unturned_TC", "qkv_TC", "attended_TDP", "lse", "mid_TD"})
KEEP = {  # what a pass holds on to between forward and backward, from the most memory to the least
    "everything": ATTENTION | {"normed_TDP", "mid_normed_TDP", "gate_up_T2F", "act_TFP"},
    "products": ATTENTION | {"gate_up_T2F"},
    "attention": ATTENTION,
    "inputs": frozenset[str](),
}


def forward(
    context: Context, layer: Layer, h_TD: Tensor, delta_TD: Tensor | None, keep: frozenset[str]
) -> tuple[Saved, Tensor, Tensor]:
    """What to save, mid and y, whose sum is the layer's output. Its input is h + delta."""
    saved = Saved(h_TD)
    saved.normed_TDP = layer.qkv.rows(h_TD)
    saved.x_TD = _norm(context, h_TD, delta_TD, layer.norm_in_D, layer.eps, saved.normed_TDP)
    layer.qkv.project(context.matrices[layer.qkv], saved.normed_TDP)
    complete(context, layer, saved)
    assert saved.mid_TD is not None
    assert saved.act_TFP is not None
    y_TD = layer.down.forward(context.matrices[layer.down], saved.act_TFP)
    mid_TD = saved.mid_TD
    for name in KEEP["everything"] - keep:
        setattr(saved, name, None)
    return saved, mid_TD, y_TD


def complete(context: Context, layer: Layer, saved: Saved) -> None:
    """Compute what `saved` lacks, from what it has."""
    ops, matrices = context.ops, context.matrices
    if saved.normed_TDP is None:
        saved.normed_TDP = layer.qkv.rows(saved.x_TD)
        _norm(context, saved.x_TD, None, layer.norm_in_D, layer.eps, saved.normed_TDP)
        layer.qkv.project(matrices[layer.qkv], saved.normed_TDP)
    if saved.qkv_TC is None:
        saved.qkv_TC = layer.qkv.forward(matrices[layer.qkv], saved.normed_TDP)
        if layer.head_norms is not None:
            saved.unturned_TC = saved.qkv_TC
            saved.qkv_TC = normalise_heads(saved.qkv_TC, layer.shape, layer.head_norms)
        ops.rope(saved.qkv_TC, context.rows, context.rope, layer.shape)
    if saved.attended_TDP is None:
        saved.attended_TDP = layer.o.rows(saved.x_TD)
        attended_TD = saved.attended_TDP[:, : layer.o.columns_in]
        saved.lse = ops.attention(saved.qkv_TC, context.rows, layer.shape, attended_TD)
        layer.o.project(matrices[layer.o], saved.attended_TDP)
    if saved.mid_normed_TDP is None:
        saved.mid_normed_TDP = layer.gate_up.rows(saved.x_TD)
        before_TD, delta_TD = saved.mid_TD, None
        if before_TD is None:
            before_TD, delta_TD = saved.x_TD, layer.o.forward(matrices[layer.o], saved.attended_TDP)
        saved.mid_TD = _norm(context, before_TD, delta_TD, layer.norm_mid_D, layer.eps, saved.mid_normed_TDP)
        layer.gate_up.project(matrices[layer.gate_up], saved.mid_normed_TDP)
    if saved.gate_up_T2F is None:
        spare = layer.gate_up.spare  # the gradient will take the products' place
        saved.gate_up_T2F = layer.gate_up.forward(matrices[layer.gate_up], saved.mid_normed_TDP, spare=spare)
    if saved.act_TFP is None:
        saved.act_TFP = layer.down.rows(saved.x_TD)
        ops.swiglu(saved.gate_up_T2F, saved.act_TFP[:, : layer.down.columns_in])
        layer.down.project(matrices[layer.down], saved.act_TFP)


def backward(context: Context, layer: Layer, saved: Saved, dh_TDP: Tensor, *, want_dx: bool = True) -> None:
    """Turn the gradient of the layer's output in `dh_TDP` into that of its input, in place.

    Adds to the adapters' gradients. Without `want_dx` (the first layer, whose input nobody trains) the last
    product is left out and `dh_TDP` is of no further use.
    """
    complete(context, layer, saved)
    assert saved.qkv_TC is not None
    assert saved.mid_TD is not None
    assert saved.gate_up_T2F is not None
    assert saved.normed_TDP is not None
    assert saved.mid_normed_TDP is not None
    assert saved.attended_TDP is not None
    assert saved.act_TFP is not None
    ops = context.ops
    dh_TD = dh_TDP[:, : saved.x_TD.shape[1]]

    dact_TF = _through(context, layer.down, dh_TDP, saved.act_TFP, into_x=True)
    ops.swiglu_backward(dact_TF, saved.gate_up_T2F, saved.gate_up_T2F)
    dgate_up = _widened(saved.gate_up_T2F, layer.gate_up)
    saved.act_TFP = saved.gate_up_T2F = None
    del dact_TF
    dnormed_TD = _through(context, layer.gate_up, dgate_up, saved.mid_normed_TDP, into_x=True)
    del dgate_up
    ops.rms_norm_backward(dnormed_TD, saved.mid_TD, layer.norm_mid_D, layer.eps, dh_TD)
    saved.mid_normed_TDP = saved.mid_TD = None
    del dnormed_TD

    dattended_TD = _through(context, layer.o, dh_TDP, saved.attended_TDP)
    dqkv = dh_TDP.new_empty(len(dh_TDP), layer.qkv.columns_out + layer.qkv.spare)
    dqkv_TC = dqkv[:, : layer.qkv.columns_out]
    attended_TD = saved.attended_TDP[:, : layer.o.columns_in]
    ops.attention_backward(dattended_TD, saved.qkv_TC, attended_TD, saved.lse, context.rows, layer.shape, dqkv_TC)
    ops.rope(dqkv_TC, context.rows, context.rope, layer.shape, inverse=True)
    if layer.head_norms is not None:
        assert saved.unturned_TC is not None
        normalise_heads_backward(dqkv_TC, saved.unturned_TC, layer.shape, layer.head_norms)
    matrix = context.matrices[layer.qkv]
    dnormed = layer.qkv.backward(matrix, dqkv, saved.normed_TDP, ops, into_x=True, want_dx=want_dx)
    if dnormed is not None:
        ops.rms_norm_backward(dnormed, saved.x_TD, layer.norm_in_D, layer.eps, dh_TD)


def _norm(
    context: Context, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, out_TDP: Tensor
) -> Tensor:
    return context.ops.rms_norm(x_TD, delta_TD, weight_D, eps, out_TDP[:, : x_TD.shape[1]])


def _widened(y_TN: Tensor, linear: FusedLinear) -> Tensor:
    """`y_TN`, a view made by `linear.forward` with room for its spare columns, with them."""
    return y_TN.as_strided((y_TN.shape[0], linear.columns_out + linear.spare), y_TN.stride(), y_TN.storage_offset())


def _through(context: Context, linear: FusedLinear, dy: Tensor, x: Tensor, *, into_x: bool = False) -> Tensor:
    """The gradient of `linear`'s input; `dy` may have more spare columns than this product needs."""
    dy = dy[:, : linear.columns_out + linear.spare]
    dx = linear.backward(context.matrices[linear], dy, x, context.ops, into_x=into_x)
    assert dx is not None
    return dx
