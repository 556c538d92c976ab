"""One decoder layer, forward and backward by hand, over a packed row.

Forward, with h the running sum of the residual stream:

    x   = h + what the layer before left to add        a   = attention(rope([q k v](norm x)))
    mid = x + o(a)                                     y   = down(silu(gate) * up),  [gate up](norm mid)

The sum mid + y is left to the next layer's norm, which reads both anyway. Every input of a product lives in a
buffer with spare columns for the adapters (see linear.py); all buffers are the workspace's.

In the last layer only supervised rows need go on from attention to o and the feed-forward.

Shape suffixes: T tokens, S rows that go on, D hidden, F feed-forward, C query, key and value columns, P spare columns
for the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from parley.train_step.bind import Layer
from parley.train_step.fused_linear import FusedLinear, Matrices
from parley.train_step.matmul import put
from parley.train_step.ops import Ops, Rope
from parley.train_step.packed_batch import Rows
from parley.train_step.qk_norm import normalise_heads, normalise_heads_backward
from parley.train_step.workspace import KEEP, Workspace


@dataclass(frozen=True)
class Context:
    """What all layers of a pass share."""

    ops: Ops
    matrices: Matrices
    rope: Rope
    rows: Rows
    workspace: Workspace
    tokens: int  # in a buffer: the pass's, or those that go on

    def take(self, name: str, index: int, wide: int | None = None) -> Tensor:
        return self.workspace.take(name, index, self.tokens, wide)

    def slices(self) -> Iterator[slice]:
        """The rows that go through the feed-forward at a time."""
        step = self.workspace.plan.feed_rows or self.tokens
        return (slice(begin, min(begin + step, self.tokens)) for begin in range(0, self.tokens, step))


@dataclass(frozen=True)
class Onward:
    """The rows `row_S` that alone go on from attention; those from `real` on are there for their number."""

    row_S: Tensor
    real: int

    def spread(self, x_SD: Tensor, out_TD: Tensor) -> Tensor:
        """`x_SD` in its places of `out_TD`, and nothing elsewhere."""
        return out_TD.zero_().index_copy_(0, self.row_S[: self.real], x_SD[: self.real])


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
    fewer: Saved | None = None  # from attention on, where fewer rows go on

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
    context: Context, layer: Layer, index: int, h_TD: Tensor, delta_TD: Tensor | None, onward: Onward | None = None
) -> tuple[Saved, Tensor, Tensor]:
    """What to save, mid and y, whose sum is the layer's output. Its input is h + delta; h is x in the first layer.

    With `onward` mid and y have its rows alone; the plan has to keep everything.
    """
    normed = context.take("normed", index, layer.qkv.columns_in + layer.qkv.spare)
    x_TD = h_TD if delta_TD is None else context.take("x", index)
    _norm(context, h_TD, delta_TD, layer.norm_in_D, layer.eps, normed, x_TD)
    layer.qkv.project(context.matrices[layer.qkv], normed)
    saved = Saved(index, x_TD, normed)
    _attend(context, layer, saved)
    if onward is None:
        return saved, *_go_on(context, layer, saved)
    assert saved.attended is not None
    x_SD, attended = (tensor.index_select(0, onward.row_S) for tensor in (saved.x, saved.attended))
    saved.fewer = Saved(index, x_SD, attended=attended)
    return saved, *_go_on(replace(context, tokens=len(x_SD)), layer, saved.fewer)


def _go_on(context: Context, layer: Layer, saved: Saved) -> tuple[Tensor, Tensor]:
    """mid and y, from attention on."""
    _rejoin(context, layer, saved)
    assert saved.mid is not None
    mid_TD, y_TD = saved.mid, context.take("branch", saved.index)
    for part in context.slices():
        gate_up, act = _feed(context, layer, saved, part)
        put(layer.down.forward(context.matrices[layer.down], act, y_TD[part]), y_TD[part])
        if "gate_up" in KEEP[context.workspace.plan.keep]:
            saved.gate_up, saved.act = gate_up, act
    saved.forget(KEEP[context.workspace.plan.keep])
    return mid_TD, y_TD


def _attend(context: Context, layer: Layer, saved: Saved) -> None:
    """Compute what `saved` lacks up to attention, from what it has."""
    ops, matrices = context.ops, context.matrices
    index = saved.index
    if saved.normed is None:
        saved.normed = context.take("normed", index, layer.qkv.columns_in + layer.qkv.spare)
        _norm(context, saved.x, None, layer.norm_in_D, layer.eps, saved.normed, saved.x)
        layer.qkv.project(matrices[layer.qkv], saved.normed)
    if saved.qkv is None:
        saved.qkv = context.take("qkv", index, layer.qkv.columns_out)
        put(layer.qkv.forward(matrices[layer.qkv], saved.normed, saved.qkv), saved.qkv)
        if layer.head_norms is not None:
            saved.unturned = context.take("unturned", index, layer.qkv.columns_out).copy_(saved.qkv)
            normalise_heads(saved.qkv, layer.shape, layer.head_norms)
        ops.rope(saved.qkv, context.rows, context.rope, layer.shape)
    if saved.attended is None:
        saved.attended = context.take("attended", index, layer.o.columns_in + layer.o.spare)
        attended_TD = saved.attended[:, : layer.o.columns_in]
        saved.lse = ops.attention(saved.qkv, context.rows, layer.shape, attended_TD)
        layer.o.project(matrices[layer.o], saved.attended)


def _rejoin(context: Context, layer: Layer, saved: Saved) -> None:
    """Compute what `saved` lacks from attention to the feed-forward."""
    matrices, index = context.matrices, saved.index
    assert saved.attended is not None
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
        put(layer.gate_up.forward(context.matrices[layer.gate_up], saved.mid_normed[part], products), products)
    if act is None:
        act = take("act", saved.index, rows, layer.down.columns_in + layer.down.spare)
        context.ops.swiglu(gate_up[:, : layer.gate_up.columns_out], act[:, : layer.down.columns_in])
        layer.down.project(context.matrices[layer.down], act)
    return gate_up, act


def backward(
    context: Context, layer: Layer, saved: Saved, dh_TDP: Tensor, *, want_dx: bool = True, onward: Onward | None = None
) -> Tensor:
    """Turn the gradient of the layer's output in `dh_TDP` into that of its input, in place, and return it.

    Adds to the adapters' gradients. Without `want_dx` (the first layer, whose input nobody trains) the last
    product is left out and the result is of no further use. With the `onward` of the forward pass, `dh_TDP` has its
    rows alone and the result is the workspace's "dh".
    """
    dattended_TD = context.take("dattended", saved.index, layer.o.columns_in)
    if onward is None:
        _attend(context, layer, saved)
        dattended_TD = _go_back(context, layer, saved, dh_TDP, dattended_TD)
    else:
        assert saved.fewer is not None
        rows = len(onward.row_S)
        room_SD = dattended_TD.new_empty(rows, layer.o.columns_in)
        dattended_SD = _go_back(replace(context, tokens=rows), layer, saved.fewer, dh_TDP, room_SD)
        onward.spread(dattended_SD, dattended_TD)
        dh_TDP = onward.spread(dh_TDP, context.take("dh", saved.index))
    _attend_back(context, layer, saved, dattended_TD, dh_TDP, want_dx=want_dx)
    return dh_TDP


def _go_back(context: Context, layer: Layer, saved: Saved, dh_TDP: Tensor, room_TD: Tensor) -> Tensor:
    """The gradient of attention's output, with `room_TD` for it; `dh_TDP` becomes that of the residual stream there."""
    _rejoin(context, layer, saved)
    assert saved.mid is not None
    assert saved.mid_normed is not None
    assert saved.attended is not None
    ops, dnormed_TD = context.ops, saved.mid_normed[:, : layer.gate_up.columns_in]
    for part in context.slices():  # gradients take the place of what they are the gradients of
        gate_up, act = _feed(context, layer, saved, part)
        products = gate_up[:, : layer.gate_up.columns_out]
        dact_TF = _through(context, layer.down, dh_TDP[part], act, act)
        ops.swiglu_backward(dact_TF, products, products)
        normed = saved.mid_normed[part]
        put(_through(context, layer.gate_up, gate_up, normed, normed), dnormed_TD[part])
    dh_TD = dh_TDP[:, : saved.x.shape[1]]
    ops.rms_norm_backward(dnormed_TD, saved.mid, layer.norm_mid_D, layer.eps, dh_TD)
    return _through(context, layer.o, dh_TDP, saved.attended, room_TD)


def _attend_back(
    context: Context, layer: Layer, saved: Saved, dattended_TD: Tensor, dh_TDP: Tensor, *, want_dx: bool
) -> None:
    """From attention's output to the layer's input."""
    assert saved.qkv is not None
    assert saved.normed is not None
    assert saved.attended is not None
    ops = context.ops
    dqkv = context.take("dqkv", saved.index, layer.qkv.columns_out + layer.qkv.spare)
    dqkv_TC = dqkv[:, : layer.qkv.columns_out]
    attended_TD = saved.attended[:, : layer.o.columns_in]
    ops.attention_backward(dattended_TD, saved.qkv, attended_TD, saved.lse, context.rows, layer.shape, dqkv_TC)
    ops.rope(dqkv_TC, context.rows, context.rope, layer.shape, inverse=True)
    if layer.head_norms is not None:
        assert saved.unturned is not None
        normalise_heads_backward(dqkv_TC, saved.unturned, layer.shape, layer.head_norms)
    dnormed_TD = _through(context, layer.qkv, dqkv, saved.normed, saved.normed, want_dx=want_dx)
    if want_dx:
        dh_TD = dh_TDP[:, : saved.x.shape[1]]
        ops.rms_norm_backward(dnormed_TD, saved.x, layer.norm_in_D, layer.eps, dh_TD)


def _norm(
    context: Context, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, out: Tensor, total_TD: Tensor
) -> None:
    context.ops.rms_norm(x_TD, delta_TD, weight_D, eps, out[:, : x_TD.shape[1]], total_TD)


def _through(
    context: Context, linear: FusedLinear, dy: Tensor, x: Tensor, room: Tensor, *, want_dx: bool = True
) -> Tensor:
    """The gradient of `linear`'s input, with the first columns of `room` for it; unwritten without `want_dx`.

    `dy` may have more spare columns than needed.
    """
    dy = dy[:, : linear.columns_out + linear.spare]
    room_TK = room[:, : linear.columns_in]
    dx_TK = linear.backward(context.matrices[linear], dy, x, context.ops, room_TK if want_dx else None)
    return room_TK if dx_TK is None else dx_TK
