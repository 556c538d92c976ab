"""One decoder layer, forward and backward by hand, over a packed row.

Forward, with h the running sum of the residual stream:

    x   = h + what the layer before left to add        a   = attention(rope([q k v](norm x)))
    mid = x + o(a)                                     y   = down(silu(gate) * up),  [gate up](norm mid)

The sum mid + y is left to the next layer's norm, which reads both anyway. Every input of a product lives in a
buffer with spare columns for the adapters (see linear.py); all buffers are the workspace's.

Shape suffixes: T tokens, D hidden, F feed-forward, C query, key and value columns, P spare columns for the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parley.engine.bind import Layer
from parley.engine.documents import Rows
from parley.engine.heads import normalise_heads, normalise_heads_backward
from parley.engine.linear import FusedLinear, Matrices
from parley.engine.ops import Ops, Rope
from parley.engine.workspace import KEEP, Workspace


@dataclass(frozen=True)
class Context:
    """What all layers of a pass share."""

    ops: Ops
    matrices: Matrices
    rope: Rope
    rows: Rows
    workspace: Workspace

    def take(self, name: str, index: int, wide: int | None = None) -> Tensor:
        return self.workspace.take(name, index, self.rows.tokens, wide)

    def slices(self) -> Iterator[slice]:
        """The rows that go through the feed-forward at a time."""
        step = self.workspace.plan.feed_rows or self.rows.tokens
        return (slice(begin, min(begin + step, self.rows.tokens)) for begin in range(0, self.rows.tokens, step))


@dataclass
class Saved:
    """What the backward pass of layer `index` reads. What a plan does not keep is None until it is computed anew."""

    index: int
    x: Tensor
    normed: Tensor | None = None
    unturned: Tensor | None = None  # before the head norms, for families that have them
    qkv: Tensor | None = None
    attended: Tensor | None = None
    lse: Any = None
    mid: Tensor | None = None
    mid_normed: Tensor | None = None
    gate_up: Tensor | None = None
    act: Tensor | None = None

    def forget(self, keep: frozenset[str]) -> None:
        """Drop what is not kept; `lse` goes with the attention it belongs to."""
        for name in KEEP["everything"] - keep:
            setattr(self, name, None)
        if "attended" not in keep:
            self.lse = None

    def kept(self) -> dict[str, Tensor]:
        named = {name: vars(self)[name] for name in KEEP["everything"]}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def forward(
    context: Context, layer: Layer, index: int, h_TD: Tensor, delta_TD: Tensor | None
) -> tuple[Saved, Tensor, Tensor]:
    """What to save, mid and y, whose sum is the layer's output. Its input is h + delta; h is x in the first layer."""
    normed = context.take("normed", index, layer.qkv.columns_in + layer.qkv.spare)
    x_TD = h_TD if delta_TD is None else context.take("x", index)
    _norm(context, h_TD, delta_TD, layer.norm_in_D, layer.eps, normed, x_TD)
    layer.qkv.project(context.matrices[layer.qkv], normed)
    saved = Saved(index, x_TD, normed)
    complete(context, layer, saved)
    assert saved.mid is not None
    y_TD = context.take("branch", index)
    for part in context.slices():
        gate_up, act = _feed(context, layer, saved, part)
        layer.down.forward(context.matrices[layer.down], act, y_TD[part])
        if "gate_up" in KEEP[context.workspace.plan.keep]:
            saved.gate_up, saved.act = gate_up, act
    mid_TD = saved.mid
    saved.forget(KEEP[context.workspace.plan.keep])
    return saved, mid_TD, y_TD


def complete(context: Context, layer: Layer, saved: Saved) -> None:
    """Compute what `saved` lacks before the feed-forward, from what it has."""
    ops, matrices = context.ops, context.matrices
    index = saved.index
    if saved.normed is None:
        saved.normed = context.take("normed", index, layer.qkv.columns_in + layer.qkv.spare)
        _norm(context, saved.x, None, layer.norm_in_D, layer.eps, saved.normed, saved.x)
        layer.qkv.project(matrices[layer.qkv], saved.normed)
    if saved.qkv is None:
        saved.qkv = context.take("qkv", index, layer.qkv.columns_out)
        layer.qkv.forward(matrices[layer.qkv], saved.normed, saved.qkv)
        if layer.head_norms is not None:
            saved.unturned = context.take("unturned", index, layer.qkv.columns_out).copy_(saved.qkv)
            normalise_heads(saved.qkv, layer.shape, layer.head_norms)
        ops.rope(saved.qkv, context.rows, context.rope, layer.shape)
    if saved.attended is None:
        saved.attended = context.take("attended", index, layer.o.columns_in + layer.o.spare)
        attended_TD = saved.attended[:, : layer.o.columns_in]
        saved.lse = ops.attention(saved.qkv, context.rows, layer.shape, attended_TD)
        layer.o.project(matrices[layer.o], saved.attended)
    if saved.mid_normed is None:
        saved.mid_normed = context.take("mid_normed", index, layer.gate_up.columns_in + layer.gate_up.spare)
        before_TD, delta_TD = saved.mid, None
        if before_TD is None:
            before_TD, saved.mid = saved.x, context.take("mid", index)
            delta_TD = layer.o.forward(matrices[layer.o], saved.attended, context.take("branch", index))
        _norm(context, before_TD, delta_TD, layer.norm_mid_D, layer.eps, saved.mid_normed, saved.mid)
        layer.gate_up.project(matrices[layer.gate_up], saved.mid_normed)


def _feed(context: Context, layer: Layer, saved: Saved, part: slice) -> tuple[Tensor, Tensor]:
    """The feed-forward's two products of the rows `part`: [gate up], with room for v, and down's input."""
    assert saved.mid_normed is not None
    rows, take = part.stop - part.start, context.workspace.take
    gate_up, act = saved.gate_up, saved.act
    if gate_up is None:
        gate_up = take("gate_up", saved.index, rows, layer.gate_up.columns_out + layer.gate_up.spare)
        products = gate_up[:, : layer.gate_up.columns_out]
        layer.gate_up.forward(context.matrices[layer.gate_up], saved.mid_normed[part], products)
    if act is None:
        act = take("act", saved.index, rows, layer.down.columns_in + layer.down.spare)
        context.ops.swiglu(gate_up[:, : layer.gate_up.columns_out], act[:, : layer.down.columns_in])
        layer.down.project(context.matrices[layer.down], act)
    return gate_up, act


def backward(context: Context, layer: Layer, saved: Saved, dh_TDP: Tensor, *, want_dx: bool = True) -> None:
    """Turn the gradient of the layer's output in `dh_TDP` into that of its input, in place.

    Adds to the adapters' gradients. Without `want_dx` (the first layer, whose input nobody trains) the last
    product is left out and `dh_TDP` is of no further use.
    """
    complete(context, layer, saved)
    assert saved.qkv is not None
    assert saved.mid is not None
    assert saved.normed is not None
    assert saved.mid_normed is not None
    assert saved.attended is not None
    ops, index = context.ops, saved.index
    dh_TD = dh_TDP[:, : saved.x.shape[1]]

    for part in context.slices():  # gradients take the place of what they are the gradients of
        gate_up, act = _feed(context, layer, saved, part)
        products = gate_up[:, : layer.gate_up.columns_out]
        dact_TF = _through(context, layer.down, dh_TDP[part], act, act)
        ops.swiglu_backward(dact_TF, products, products)
        _through(context, layer.gate_up, gate_up, saved.mid_normed[part], saved.mid_normed[part])
    dnormed_TD = saved.mid_normed[:, : layer.gate_up.columns_in]
    ops.rms_norm_backward(dnormed_TD, saved.mid, layer.norm_mid_D, layer.eps, dh_TD)

    dattended_TD = context.take("dattended", index, layer.o.columns_in)
    _through(context, layer.o, dh_TDP, saved.attended, dattended_TD)
    dqkv = context.take("dqkv", index, layer.qkv.columns_out + layer.qkv.spare)
    dqkv_TC = dqkv[:, : layer.qkv.columns_out]
    attended_TD = saved.attended[:, : layer.o.columns_in]
    ops.attention_backward(dattended_TD, saved.qkv, attended_TD, saved.lse, context.rows, layer.shape, dqkv_TC)
    ops.rope(dqkv_TC, context.rows, context.rope, layer.shape, inverse=True)
    if layer.head_norms is not None:
        assert saved.unturned is not None
        normalise_heads_backward(dqkv_TC, saved.unturned, layer.shape, layer.head_norms)
    dnormed_TD = _through(context, layer.qkv, dqkv, saved.normed, saved.normed if want_dx else None)
    if dnormed_TD is not None:
        ops.rms_norm_backward(dnormed_TD, saved.x, layer.norm_in_D, layer.eps, dh_TD)


def _norm(
    context: Context, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, out: Tensor, total_TD: Tensor
) -> None:
    context.ops.rms_norm(x_TD, delta_TD, weight_D, eps, out[:, : x_TD.shape[1]], total_TD)


def _through(context: Context, linear: FusedLinear, dy: Tensor, x: Tensor, out: Tensor | None) -> Tensor | None:
    """The gradient of `linear`'s input, in the first columns of `out`; `dy` may have more spare columns than needed."""
    dy = dy[:, : linear.columns_out + linear.spare]
    dx_TK = None if out is None else out[:, : linear.columns_in]
    linear.backward(context.matrices[linear], dy, x, context.ops, dx_TK)
    return dx_TK
