"""Frozen projections that share their input, and the LoRA adapters on them, as one matrix.

For y = x W^T + s (x A^T) B^T the block matrix

    M = [[W, s B],        of shape (N + P, K + P)
         [A,   0]]

turns each direction into one small and one large product over rows that carry P extra columns:

    forward   u = x A^T,     y  = [x | u]  [W | s B]^T
    backward  v = dy (s B),  dx = [dy | v] [W ; A]

Projections side by side stack their rows of W and A; each B keeps its own columns (zeros elsewhere).

DoRA scales y by output feature (dora.py). With dropout each projection has an input of its own, x' = dropout(x):

    forward   u = x' A^T,    backward  dx = dy W + dropout(v A)

Shape suffixes (legend in docs/design.md): T tokens, K input features, N output features, P LoRA columns (the ranks of
all adapters, padded), R one rank. NKP has N rows and K + P columns, NPK N + P rows and K columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from parley.train_step import matmul
from parley.train_step.dora import DoraScale
from parley.train_step.ops import Adapter, AdapterSlice, Ops, ScaledCopy
from parley.units import round_up


class BaseWeight(Protocol):
    """A frozen weight in the format the model stores it in."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def copy_into(self, out_NK: Tensor, ops: Ops) -> None:
        """Write the weight, dequantised and cast to `out_NK`'s dtype, into the strided `out_NK`."""


@dataclass(frozen=True)
class DenseWeight:
    weight_NK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_NK.shape[0], self.weight_NK.shape[1]

    def copy_into(self, out_NK: Tensor, ops: Ops) -> None:
        out_NK.copy_(self.weight_NK)


@dataclass(frozen=True)
class FusedMatrix:
    """[W | s B] and [W ; A]: two views of one M, or two contiguous copies where oneDNN takes no sliced weight."""

    forward_NKP: Tensor
    backward_NPK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.backward_NPK.shape[0], self.forward_NKP.shape[1]


@dataclass(frozen=True)
class Dropout:
    """What the masks of a pass are made of, and memory for one projection's input.

    `scratch` has the rows of x, the widest input's columns and the widest LoRA columns. x begins at `first_row` of
    the pass: a mask is the same for all rows at once and for some of them.
    """

    ops: Ops
    seed: Tensor
    scratch: Tensor
    first_row: int = 0

    def __call__(self, x_TK: Tensor, out_TK: Tensor, stream: int, p: float, *, add: bool = False) -> None:
        self.ops.dropout(x_TK, out_TK, self.seed, stream, p, self.first_row, add=add)


@dataclass
class FusedLinear:
    """One matrix for the projections `bases`, with `adapters` (None: not adapted) on them."""

    bases: list[BaseWeight]
    adapters: list[Adapter | None]
    bias_N: Tensor | None = None
    rank_multiple: int = 1  # P is rounded up to a multiple of this, so that rows stay aligned for tensor cores
    stream: int = 0  # of the first projection's dropout
    matrix: FusedMatrix | None = None  # kept across passes where memory allows
    dora: DoraScale | None = field(init=False, default=None)
    adapter_slices: list[AdapterSlice] = field(init=False)

    def __post_init__(self) -> None:
        self.in_features = self.bases[0].shape[1]
        self.out_features = sum(base.shape[0] for base in self.bases)
        self.adapter_slices, row, column = [], 0, 0
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            if adapter is not None:
                rank = adapter.a_RK.shape[0]
                rows, columns = slice(row, row + base.shape[0]), slice(column, column + rank)
                self.adapter_slices.append(AdapterSlice(adapter, rows, columns))
                column += rank
            row += base.shape[0]
        self.lora_columns = round_up(column, self.rank_multiple)
        self.trainable_slices = [item for item in self.adapter_slices if item.adapter.trainable]
        self.has_dropout = any(item.adapter.dropout for item in self.adapter_slices)
        if any(item.adapter.magnitude is not None for item in self.adapter_slices):
            device = self.adapter_slices[0].adapter.a_RK.device
            self.dora = DoraScale(self.adapter_slices, self.out_features, device)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features + self.lora_columns, self.in_features + self.lora_columns

    def matrix_numel(self, *, contiguous: bool) -> int:
        """Elements that `allocate` takes."""
        rows, columns = self.matrix_shape
        return self.out_features * columns + rows * self.in_features if contiguous else rows * columns

    def allocate(self, dtype: torch.dtype, device: torch.device, *, contiguous: bool) -> FusedMatrix:
        """An uninitialised M; `contiguous`: its two halves apart, each in one piece."""
        rows, columns = self.matrix_shape
        if contiguous:
            forward_NKP = torch.empty(self.out_features, columns, dtype=dtype, device=device)
            return FusedMatrix(forward_NKP, torch.empty(rows, self.in_features, dtype=dtype, device=device))
        matrix = torch.empty(rows, columns, dtype=dtype, device=device)
        return FusedMatrix(matrix[: self.out_features], matrix[:, : self.in_features])

    def fill_base(self, matrix: FusedMatrix, ops: Ops) -> None:
        """Write W into `matrix` and zero the columns and rows of the adapters."""
        forward_NK, backward_NK = matrix.forward_NKP[:, : self.in_features], matrix.backward_NPK[: self.out_features]
        row = 0
        for base in self.bases:
            base.copy_into(forward_NK[row : row + base.shape[0]], ops)
            row += base.shape[0]
        if backward_NK.data_ptr() != forward_NK.data_ptr():  # two copies: 4-bit weights are dequantised once
            backward_NK.copy_(forward_NK)
        matrix.forward_NKP[:, self.in_features :].zero_()
        matrix.backward_NPK[self.out_features :].zero_()

    def adapter_copies(self, matrix: FusedMatrix) -> Iterator[ScaledCopy]:
        """The copies that bring A and s B, which change every step, into `matrix`."""
        for item in self.adapter_slices:
            top = self.out_features + item.columns.start
            left = self.in_features + item.columns.start
            rank = item.adapter.a_RK.shape[0]
            yield item.adapter.a_RK, matrix.backward_NPK[top : top + rank], 1.0
            yield item.adapter.b_NR, matrix.forward_NKP[item.rows, left : left + rank], item.adapter.scale

    def fill_adapters(self, matrix: FusedMatrix, ops: Ops) -> None:
        for copy in self.adapter_copies(matrix):
            ops.copy_scaled(*copy)
        self.update_dora(matrix)

    def update_dora(self, matrix: FusedMatrix) -> None:
        """DoRA's scale for the weights in `matrix`."""
        if self.dora is not None:
            w_NK, sb_NP = matrix.forward_NKP.split([self.in_features, self.lora_columns], dim=1)
            self.dora.update(w_NK, matrix.backward_NPK[self.out_features :], sb_NP)

    def lora_down(self, matrix: FusedMatrix, x_TKP: Tensor, dropout: Dropout | None = None) -> None:
        """Fill the LoRA columns of `x_TKP` with u = x A^T, which the forward and the backward pass read."""
        if not self.lora_columns:
            return
        u_TP, a_PK = x_TKP[:, self.in_features :], matrix.backward_NPK[self.out_features :]
        if dropout is None or not self.has_dropout:
            torch.mm(x_TKP[:, : self.in_features], a_PK.t(), out=u_TP)
            return
        u_TP.zero_()  # padding columns
        for i, item in enumerate(self.adapter_slices):
            dropped_TK = self._dropped(i, x_TKP, dropout)[:, : self.in_features]
            torch.mm(dropped_TK, a_PK[item.columns].t(), out=u_TP[:, item.columns])

    def _dropped(self, index: int, x_TKP: Tensor, dropout: Dropout) -> Tensor:
        """The input of one adapter in scratch memory, whose LoRA columns are uninitialised."""
        out_TKP = dropout.scratch[:, : x_TKP.shape[1]]
        x_TK, out_TK = x_TKP[:, : self.in_features], out_TKP[:, : self.in_features]
        p = self.adapter_slices[index].adapter.dropout
        dropout(x_TK, out_TK, self.stream + index, p)
        return out_TKP

    def forward(self, matrix: FusedMatrix, x_TKP: Tensor, out_TN: Tensor, ops: Ops) -> Tensor:
        """y of rows whose LoRA columns `lora_down` has filled, in `out_TN` or wherever `matmul.linear` puts it."""
        if self.dora is None:
            return matmul.linear(x_TKP, matrix.forward_NKP, out_TN, self.bias_N)
        y_TN = matmul.linear(x_TKP, matrix.forward_NKP, out_TN)
        ops.scale_columns(y_TN, self.dora.scale_N, self.bias_N)
        return y_TN

    def backward(
        self,
        matrix: FusedMatrix,
        dy_TNP: Tensor,
        x_TKP: Tensor,
        ops: Ops,
        out_TK: Tensor | None,
        y_TN: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor | None:
        """Add to the adapters' gradients and return dx, in `out_TK` or elsewhere as in `forward`.

        `out_TK` may be x itself; None leaves dx out. The LoRA columns of `dy_TNP` are filled with v. With DoRA `y_TN`
        is the result of the forward pass, and dy is scaled in place.
        """
        if self.dora is not None:
            assert y_TN is not None, "DoRA's gradient needs the output"
            dy_TN = dy_TNP[:, : self.out_features]
            ops.scale_columns_backward(dy_TN, y_TN, self.dora.scale_N, self.bias_N, self.dora.dot_N)
            self.dora.add_gradients()
        if self.lora_columns:
            self._lora_up_backward(matrix.forward_NKP[:, self.in_features :], dy_TNP)
        if dropout is not None and self.has_dropout:
            return self._backward_with_dropout(matrix, dy_TNP, x_TKP, ops, out_TK, dropout)
        if self.trainable_slices:
            ops.add_adapter_gradients(dy_TNP, x_TKP, self.trainable_slices, self.out_features, self.in_features)
        return None if out_TK is None else matmul.linear(dy_TNP, matrix.backward_NPK.t(), out_TK)

    def _backward_with_dropout(
        self, matrix: FusedMatrix, dy_TNP: Tensor, x_TKP: Tensor, ops: Ops, out_TK: Tensor | None, dropout: Dropout
    ) -> Tensor | None:
        """From v on, with the masks of the forward pass."""
        for i, item in enumerate(self.adapter_slices):
            if item.adapter.trainable:
                dropped_TKP = self._dropped(i, x_TKP, dropout)
                dropped_TKP[:, self.in_features :] = x_TKP[:, self.in_features :]
                ops.add_adapter_gradients(dy_TNP, dropped_TKP, [item], self.out_features, self.in_features)
        if out_TK is None:
            return None
        w_NK, a_PK = matrix.backward_NPK.split([self.out_features, self.lora_columns])
        dx_TK = matmul.linear(dy_TNP[:, : self.out_features], w_NK.t(), out_TK)
        scratch_TK, v_TP = dropout.scratch[:, : self.in_features], dy_TNP[:, self.out_features :]
        for i, item in enumerate(self.adapter_slices):
            torch.mm(v_TP[:, item.columns], a_PK[item.columns], out=scratch_TK)
            dropout(scratch_TK, dx_TK, self.stream + i, item.adapter.dropout, add=True)
        return dx_TK

    def _lora_up_backward(self, sb_NP: Tensor, dy_TNP: Tensor) -> None:
        """Fill the LoRA columns of `dy_TNP` with v = dy (s B)."""
        dy_TN, v_TP = dy_TNP[:, : self.out_features], dy_TNP[:, self.out_features :]
        if sb_NP.is_cuda:  # one launch costs less than the multiplications by the zeros between the B
            torch.mm(dy_TN, sb_NP, out=v_TP)
            return
        for item in self.adapter_slices:
            torch.mm(dy_TN[:, item.rows], sb_NP[item.rows, item.columns], out=v_TP[:, item.columns])


class FusedMatrixCache:
    """The matrix of each FusedLinear: its own where memory allows, else shared across layers, filled at each use.

    `linears` lists the fused linears of each layer in turn, `per_layer` of them.
    """

    def __init__(
        self, linears: list[FusedLinear], per_layer: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.linears, self.per_layer, self.ops = linears, per_layer, ops
        self.dtype, self.device = dtype, device
        self.contiguous = matmul.uses_onednn(dtype, device)
        self.shared: list[FusedMatrix] = []
        self.copies: Any = None  # prepared copies of all adapters into their own matrices
        self.filled_for: list[FusedLinear | None] = [None] * per_layer  # whose weights a shared matrix holds
        self.shared_index = {id(linear): i % per_layer for i, linear in enumerate(linears)}

    def allocate_all(self) -> None:
        """Give every linear a matrix of its own, filled now."""
        for linear in self.linears:
            linear.matrix = self._allocate(linear)
            linear.fill_base(linear.matrix, self.ops)
            linear.update_dora(linear.matrix)  # which takes the norms of W, once
        self.copies = self.ops.prepare_copies(
            [c for linear in self.linears if linear.matrix is not None for c in linear.adapter_copies(linear.matrix)]
        )

    def allocate_shared(self) -> None:
        """One matrix for each of a layer's linears, shared by all layers."""
        self.shared = [self._allocate(linear) for linear in self.linears[: self.per_layer]]
        for linear in self.linears:
            if linear.dora is not None:  # takes the norms of W now: FusedStep.compile fills matrices with garbage
                self[linear]
        self.filled_for = [None] * self.per_layer

    def refresh_adapters(self) -> None:
        """Bring the matrices up to date with the adapters, which the optimizer has changed."""
        self.filled_for = [None] * self.per_layer
        if self.copies is not None:
            self.ops.run_copies(self.copies)
        for linear in self.linears:
            if linear.matrix is not None:
                linear.update_dora(linear.matrix)

    def __getitem__(self, linear: FusedLinear) -> FusedMatrix:
        if linear.matrix is not None:
            return linear.matrix
        index = self.shared_index[id(linear)]
        matrix = self.shared[index]
        if self.filled_for[index] is not linear:
            if linear.matrix_shape != matrix.shape:  # a layer whose adapters differ from the first one's
                matrix = self.shared[index] = self._allocate(linear)
            linear.fill_base(matrix, self.ops)
            linear.fill_adapters(matrix, self.ops)
            self.filled_for[index] = linear
        return matrix

    def _allocate(self, linear: FusedLinear) -> FusedMatrix:
        return linear.allocate(self.dtype, self.device, contiguous=self.contiguous)
