"""One decoder layer, forward and backward by hand, over a packed batch.

Forward, with h the residual stream:

    x   = h + delta of the layer before     a = attention(rope([q k v](norm x)))
    mid = x + o(a)                          y = down(silu(gate) * up),  [gate up](norm mid)

That is Llama. Where a family says so (models/families/family.py), a norm is missing, o(a) and y go through a norm or a
factor before they are added, and the activation is another.

The sum mid + y is left to the next layer's norm, which reads both anyway. Every input of a linear lies in a buffer with
extra columns for the adapters (fused_linear.py); all buffers are the workspace's. The backward pass recomputes what was
not saved, and writes most gradients over the values that they belong to.

In the last layer only supervised rows need to continue past attention to o and the MLP.

Shape suffixes (legend in docs/design.md): T tokens, S supervised rows, D hidden, F feed-forward, C query, key and value
columns, P LoRA columns. A buffer with LoRA columns behind its own has no suffix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parley.train_step.bind import LayerWeights
from parley.train_step.fused_linear import Dropout, FusedLinear, FusedMatrixCache
from parley.train_step.matmul import copy_if_elsewhere
from parley.train_step.ops import Ops, RmsNorm, RopeTable
from parley.train_step.packed_batch import DeviceBatch
from parley.train_step.workspace import SAVED_BUFFERS, Workspace


@dataclass(frozen=True)
class PassContext:
    """What all layers of a pass share."""

    ops: Ops
    matrices: FusedMatrixCache
    rope: dict[str, RopeTable]
    batch: DeviceBatch
    workspace: Workspace
    tokens: int  # rows of a buffer: the pass's, or the supervised ones
    training: bool = True  # adapters have their dropout

    def take(self, name: str, index: int, columns: int | None = None) -> Tensor:
        return self.workspace.take(name, index, self.tokens, columns)

    def dropout(self, rows: slice) -> Dropout | None:
        """For a linear of these rows of the pass; None where no adapter has any."""
        if not self.training or "dropped" not in self.workspace.columns:
            return None
        scratch = self.workspace.take("dropped", 0, rows.stop - rows.start)
        return Dropout(self.ops, self.batch.seed, scratch, rows.start)

    @property
    def rows(self) -> slice:
        return slice(0, self.tokens)

    def mlp_chunks(self) -> Iterator[slice]:
        """The rows that go through the MLP at a time."""
        step = self.workspace.plan.mlp_rows or self.tokens
        return (slice(begin, min(begin + step, self.tokens)) for begin in range(0, self.tokens, step))


@dataclass(frozen=True)
class SupervisedRows:
    """The rows that continue past the last attention; those of `row_S` from `count` on are padding."""

    row_S: Tensor
    count: int

    def scatter(self, x_SD: Tensor, out_TD: Tensor) -> Tensor:
        """`x_SD` at its rows of `out_TD`, zeros elsewhere."""
        return out_TD.zero_().index_copy_(0, self.row_S[: self.count], x_SD[: self.count])


@dataclass
class SavedActivations:
    """What the backward pass of layer `index` reads. What the plan does not save is None until it is recomputed."""

    index: int
    x: Tensor
    normed: Tensor | None = None
    qkv_unnormed: Tensor | None = None  # before the norms of query and key heads, for families that have them
    qkv: Tensor | None = None
    attention_out: Tensor | None = None
    lse: Any = None
    attention_branch: Tensor | None = None  # o(a) before its norm, for families that have one
    mid: Tensor | None = None
    mid_normed: Tensor | None = None
    gate_up: Tensor | None = None
    act: Tensor | None = None
    mlp_branch: Tensor | None = None  # y before its norm
    supervised: SavedActivations | None = None  # past attention, where only supervised rows continue

    def drop_unsaved(self, saved: frozenset[str]) -> None:
        """Drop every buffer that is not in `saved`; the log-sum-exp is kept with the attention output it belongs to."""
        for name in SAVED_BUFFERS["all"] - saved:
            setattr(self, name, None)
        if "attention_out" not in saved:
            self.lse = None

    def tensors(self) -> dict[str, Tensor]:
        named = {name: vars(self)[name] for name in SAVED_BUFFERS["all"]}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def forward(
    context: PassContext,
    layer: LayerWeights,
    index: int,
    h_TD: Tensor,
    delta_TD: Tensor | None,
    supervised: SupervisedRows | None = None,
) -> tuple[SavedActivations, Tensor, Tensor]:
    """What to save, mid and y, whose sum is the layer's output. Its input is h + delta; h is x in the first layer.

    With `supervised`, mid and y have its rows alone; the plan has to save everything.
    """
    normed = context.take("normed", index, layer.qkv.in_features + layer.qkv.lora_columns)
    x_TD = h_TD if delta_TD is None else context.take("x", index)
    _norm(context, h_TD, delta_TD, layer.input_norm, normed, x_TD)
    _lora_down(context, layer.qkv, normed)
    saved = SavedActivations(index, x_TD, normed)
    _recompute_attention(context, layer, saved)
    if supervised is None:
        return saved, *_mlp(context, layer, saved)
    assert saved.attention_out is not None
    x_SD, attention_out = (tensor.index_select(0, supervised.row_S) for tensor in (saved.x, saved.attention_out))
    saved.supervised = SavedActivations(index, x_SD, attention_out=attention_out)
    context = replace(context, tokens=len(x_SD))
    if layer.o.has_dropout:  # masks go by row, and the backward pass has these rows alone
        _lora_down(context, layer.o, attention_out)
    return saved, *_mlp(context, layer, saved.supervised)


def _mlp(context: PassContext, layer: LayerWeights, saved: SavedActivations) -> tuple[Tensor, Tensor]:
    """mid and y, from the attention output on; drops what is not saved."""
    _recompute_mid(context, layer, saved)
    assert saved.mid is not None
    mid_TD, y_TD = saved.mid, context.take("branch", saved.index)
    raw_TD = y_TD
    if layer.keeps_mlp_branch:
        raw_TD = saved.mlp_branch = context.take("mlp_branch", saved.index)
    policy = SAVED_BUFFERS[context.workspace.plan.saved]
    for chunk in context.mlp_chunks():
        gate_up, act = _recompute_mlp(context, layer, saved, chunk)
        _forward_into(context, layer.down, act, raw_TD[chunk])
        if "gate_up" in policy:
            saved.gate_up, saved.act = gate_up, act
    _finish_branch(context, layer, layer.mlp_out_norm, raw_TD, y_TD)
    saved.drop_unsaved(policy)
    return mid_TD, y_TD


def _finish_branch(
    context: PassContext, layer: LayerWeights, norm: RmsNorm | None, raw_TD: Tensor, out_TD: Tensor
) -> None:
    """Write what a branch adds to the residual stream into `out_TD`, from its product, which may lie there already."""
    if norm is not None:
        context.ops.rms_norm(raw_TD, None, norm.weight_D, norm.eps, out_TD)
    else:
        copy_if_elsewhere(raw_TD, out_TD)
    if layer.residual_scale is not None:
        out_TD.mul_(layer.residual_scale)


def _recompute_attention(context: PassContext, layer: LayerWeights, saved: SavedActivations) -> None:
    """Compute what `saved` lacks up to the attention output, from what it has."""
    ops, index = context.ops, saved.index
    if saved.normed is None:
        saved.normed = context.take("normed", index, layer.qkv.in_features + layer.qkv.lora_columns)
        _norm(context, saved.x, None, layer.input_norm, saved.normed, saved.x)
        _lora_down(context, layer.qkv, saved.normed)
    if saved.qkv is None:
        saved.qkv = context.take("qkv", index, layer.qkv.out_features)
        raw_TC = saved.qkv
        if layer.qk_norm is not None:  # the norm's gradient needs its input
            raw_TC = saved.qkv_unnormed = context.take("qkv_unnormed", index, layer.qkv.out_features)
        _forward_into(context, layer.qkv, saved.normed, raw_TC)
        if layer.qk_norm is not None:
            ops.qk_norm(raw_TC, layer.qk_norm, layer.shape, saved.qkv)
        if layer.rope is not None:
            ops.rope(saved.qkv, context.batch, context.rope[layer.rope], layer.shape)
    if saved.attention_out is None:
        saved.attention_out = context.take("attention_out", index, layer.o.in_features + layer.o.lora_columns)
        out_TD = saved.attention_out[:, : layer.o.in_features]
        saved.lse = ops.attention(saved.qkv, context.batch, layer.shape, out_TD)
        _lora_down(context, layer.o, saved.attention_out)


def _recompute_mid(context: PassContext, layer: LayerWeights, saved: SavedActivations) -> None:
    """Compute what `saved` lacks between the attention output and the MLP."""
    index = saved.index
    assert saved.attention_out is not None
    if saved.mid_normed is None:
        saved.mid_normed = context.take("mid_normed", index, layer.gate_up.in_features + layer.gate_up.lora_columns)
        residual_TD, delta_TD = saved.mid, None
        if residual_TD is None:
            residual_TD, saved.mid = saved.x, context.take("mid", index)
            delta_TD = _attention_branch(context, layer, saved)
        _norm(context, residual_TD, delta_TD, layer.mlp_norm, saved.mid_normed, saved.mid)
        _lora_down(context, layer.gate_up, saved.mid_normed)


def _attention_branch(context: PassContext, layer: LayerWeights, saved: SavedActivations) -> Tensor:
    """What attention adds to the residual stream, from its output."""
    out_TD = raw_TD = context.take("branch", saved.index)
    if layer.keeps_attention_branch:
        raw_TD = saved.attention_branch = context.take("attention_branch", saved.index)
    product_TD = layer.o.forward(context.matrices[layer.o], saved.attention_out, raw_TD, context.ops)
    if not (layer.transforms_branches or layer.keeps_attention_branch):  # wherever the product lies
        return product_TD
    copy_if_elsewhere(product_TD, raw_TD)
    if not layer.transforms_branches:
        return raw_TD
    _finish_branch(context, layer, layer.attention_out_norm, raw_TD, out_TD)
    return out_TD


def _recompute_mlp(
    context: PassContext, layer: LayerWeights, saved: SavedActivations, chunk: slice
) -> tuple[Tensor, Tensor]:
    """[gate up] of the rows `chunk`, with LoRA columns for v, and the input of down."""
    assert saved.mid_normed is not None
    rows, take = chunk.stop - chunk.start, context.workspace.take
    gate_up, act = saved.gate_up, saved.act
    if gate_up is None:
        gate_up = take("gate_up", saved.index, rows, layer.gate_up.out_features + layer.gate_up.lora_columns)
        out_T2F = gate_up[:, : layer.gate_up.out_features]
        _forward_into(context, layer.gate_up, saved.mid_normed[chunk], out_T2F)
    if act is None:
        act = take("act", saved.index, rows, layer.down.in_features + layer.down.lora_columns)
        gate_up_T2F = gate_up[:, : layer.gate_up.out_features]
        context.ops.glu(gate_up_T2F, act[:, : layer.down.in_features], layer.activation)
        _lora_down(context, layer.down, act, chunk)
    return gate_up, act


def backward(
    context: PassContext,
    layer: LayerWeights,
    saved: SavedActivations,
    dh_TDP: Tensor,
    *,
    want_dx: bool = True,
    supervised: SupervisedRows | None = None,
) -> Tensor:
    """Turn the gradient of the layer's output in `dh_TDP` into that of its input, in place, and return it.

    Adds to the adapters' gradients. Without `want_dx` (the first layer, whose input is frozen) the last product is
    left out and the result is undefined. With the `supervised` of the forward pass, `dh_TDP` has its rows alone and the
    result is the workspace's "dh".
    """
    dattention_TD = context.take("dattention_out", saved.index, layer.o.in_features)
    if supervised is None:
        _recompute_attention(context, layer, saved)
        dattention_TD = _mlp_backward(context, layer, saved, dh_TDP, dattention_TD)
    else:
        assert saved.supervised is not None
        rows = len(supervised.row_S)
        # Not from the workspace, whose buffer has all rows and receives the result of the scatter.
        buffer_SD = dattention_TD.new_empty(rows, layer.o.in_features)
        dattention_SD = _mlp_backward(replace(context, tokens=rows), layer, saved.supervised, dh_TDP, buffer_SD)
        supervised.scatter(dattention_SD, dattention_TD)
        dh_TDP = supervised.scatter(dh_TDP, context.take("dh", saved.index))
    _attention_backward(context, layer, saved, dattention_TD, dh_TDP, want_dx=want_dx)
    return dh_TDP


def _mlp_backward(
    context: PassContext, layer: LayerWeights, saved: SavedActivations, dh_TDP: Tensor, out_TD: Tensor
) -> Tensor:
    """The gradient of the attention output, in `out_TD` or elsewhere; `dh_TDP` becomes that of the residual stream."""
    _recompute_mid(context, layer, saved)
    assert saved.mid is not None
    assert saved.mid_normed is not None
    assert saved.attention_out is not None
    ops, dnormed_TD = context.ops, saved.mid_normed[:, : layer.gate_up.in_features]
    for chunk in context.mlp_chunks():  # each gradient overwrites the value that it belongs to
        gate_up, act = _recompute_mlp(context, layer, saved, chunk)
        products_T2F = gate_up[:, : layer.gate_up.out_features]
        raw_TD = _mlp_branch(context, layer, saved, chunk, act)
        dy = _branch_gradient(context, layer, layer.down, layer.mlp_out_norm, raw_TD, dh_TDP[chunk])
        dact_TF = _linear_backward(context, layer.down, dy, act, act, raw_TD, chunk)
        dgate_up = gate_up
        if layer.gate_up.dora is not None:  # whose gradient needs the products
            dgate_up = context.workspace.take("dgate_up", 0, len(gate_up), gate_up.shape[1])
        dproducts_T2F = dgate_up[:, : layer.gate_up.out_features]
        ops.glu_backward(dact_TF, products_T2F, dproducts_T2F, layer.activation)
        normed = saved.mid_normed[chunk]
        dx_TD = _linear_backward(context, layer.gate_up, dgate_up, normed, normed, products_T2F, chunk)
        copy_if_elsewhere(dx_TD, dnormed_TD[chunk])
    _norm_backward(context, dnormed_TD, saved.mid, layer.mlp_norm, dh_TDP)
    if layer.keeps_attention_branch and saved.attention_branch is None:
        _attention_branch(context, layer, saved)
    raw_TD = saved.attention_branch
    dy = _branch_gradient(context, layer, layer.o, layer.attention_out_norm, raw_TD, dh_TDP)
    return _linear_backward(context, layer.o, dy, saved.attention_out, out_TD, raw_TD)


def _mlp_branch(
    context: PassContext, layer: LayerWeights, saved: SavedActivations, chunk: slice, act: Tensor
) -> Tensor | None:
    """The rows `chunk` of down's product, where its gradient needs them."""
    if not layer.keeps_mlp_branch:
        return None
    if saved.mlp_branch is not None:
        return saved.mlp_branch[chunk]
    raw_TD = context.take("mlp_branch", saved.index)[chunk]
    return _forward_into(context, layer.down, act, raw_TD)


def _branch_gradient(
    context: PassContext,
    layer: LayerWeights,
    linear: FusedLinear,
    norm: RmsNorm | None,
    raw_TD: Tensor | None,
    dh_TDP: Tensor,
) -> Tensor:
    """The gradient of a branch's product by `linear`, with LoRA columns: `dh_TDP` itself where nothing lies between."""
    if norm is None and layer.residual_scale is None and linear.dora is None:  # DoRA scales it in place
        return dh_TDP
    hidden = layer.down.out_features
    dy_TDP = context.workspace.take("dbranch", 0, len(dh_TDP), dh_TDP.shape[1])
    dy_TD = dy_TDP[:, :hidden]
    if norm is None:
        context.ops.copy_scaled(dh_TDP[:, :hidden], dy_TD, layer.residual_scale or 1.0)
        return dy_TDP
    assert raw_TD is not None
    context.ops.rms_norm_backward(dh_TDP[:, :hidden], raw_TD, norm.weight_D, norm.eps, dy_TD.zero_())
    if layer.residual_scale is not None:
        dy_TD.mul_(layer.residual_scale)
    return dy_TDP


def _attention_backward(
    context: PassContext,
    layer: LayerWeights,
    saved: SavedActivations,
    dattention_TD: Tensor,
    dh_TDP: Tensor,
    *,
    want_dx: bool,
) -> None:
    """From the gradient of the attention output to that of the layer's input, added to `dh_TDP`."""
    assert saved.qkv is not None
    assert saved.normed is not None
    assert saved.attention_out is not None
    ops = context.ops
    dqkv = context.take("dqkv", saved.index, layer.qkv.out_features + layer.qkv.lora_columns)
    dqkv_TC = dqkv[:, : layer.qkv.out_features]
    out_TD = saved.attention_out[:, : layer.o.in_features]
    ops.attention_backward(dattention_TD, saved.qkv, out_TD, saved.lse, context.batch, layer.shape, dqkv_TC)
    if layer.rope is not None:  # a rotation is orthogonal, so its gradient is the inverse rotation
        ops.rope(dqkv_TC, context.batch, context.rope[layer.rope], layer.shape, inverse=True)
    if layer.qk_norm is not None:
        assert saved.qkv_unnormed is not None
        ops.qk_norm_backward(dqkv_TC, saved.qkv_unnormed, layer.qk_norm, layer.shape)
    raw_TC = saved.qkv if saved.qkv_unnormed is None else saved.qkv_unnormed
    if layer.qkv.dora is not None and layer.qk_norm is None and layer.rope is not None:  # the product before rotation
        ops.rope(saved.qkv, context.batch, context.rope[layer.rope], layer.shape, inverse=True)
    dnormed_TD = _linear_backward(context, layer.qkv, dqkv, saved.normed, saved.normed, raw_TC, want_dx=want_dx)
    if want_dx:
        _norm_backward(context, dnormed_TD, saved.x, layer.input_norm, dh_TDP)


def _norm(
    context: PassContext, x_TD: Tensor, delta_TD: Tensor | None, norm: RmsNorm | None, out: Tensor, total_TD: Tensor
) -> None:
    """Write x + delta into `total_TD` and its norm into `out`: the sum itself where the family has no norm here."""
    out_TD = out[:, : x_TD.shape[1]]
    if norm is not None:
        context.ops.rms_norm(x_TD, delta_TD, norm.weight_D, norm.eps, out_TD, total_TD)
        return
    if delta_TD is not None:
        torch.add(x_TD, delta_TD, out=total_TD)
    out_TD.copy_(total_TD)


def _norm_backward(
    context: PassContext, dnormed_TD: Tensor, x_TD: Tensor, norm: RmsNorm | None, dh_TDP: Tensor
) -> None:
    """Add the gradient of `_norm`'s input to `dh_TDP`."""
    dh_TD = dh_TDP[:, : x_TD.shape[1]]
    if norm is None:
        dh_TD.add_(dnormed_TD)
    else:
        context.ops.rms_norm_backward(dnormed_TD, x_TD, norm.weight_D, norm.eps, dh_TD)


def _lora_down(context: PassContext, linear: FusedLinear, x: Tensor, rows: slice | None = None) -> None:
    """Fill the LoRA columns of `x`, which are these rows of the pass; all without `rows`."""
    linear.lora_down(context.matrices[linear], x, context.dropout(rows or context.rows))


def _forward_into(context: PassContext, linear: FusedLinear, x: Tensor, out_TN: Tensor) -> Tensor:
    """`linear` of `x`, whose LoRA columns are filled, in `out_TN`."""
    return copy_if_elsewhere(linear.forward(context.matrices[linear], x, out_TN, context.ops), out_TN)


def _linear_backward(
    context: PassContext,
    linear: FusedLinear,
    dy: Tensor,
    x: Tensor,
    out: Tensor,
    y_TN: Tensor | None,
    rows: slice | None = None,
    *,
    want_dx: bool = True,
) -> Tensor:
    """The gradient of `linear`'s input, in the first columns of `out` or elsewhere; undefined without `want_dx`.

    `dy` may have more LoRA columns than this linear needs. `y_TN`: the linear's result, which DoRA's gradient reads.
    `rows` as in `_lora_down`.
    """
    dy = dy[:, : linear.out_features + linear.lora_columns]
    out_TK, matrix = out[:, : linear.in_features], context.matrices[linear]
    dropout = context.dropout(rows or context.rows)
    dx_TK = linear.backward(matrix, dy, x, context.ops, out_TK if want_dx else None, y_TN, dropout)
    return out_TK if dx_TK is None else dx_TK
