"""Frozen projections that read the same rows, and the adapters on them, as one matrix.

For y = x W^T + s (x A^T) B^T the block matrix

    M = [[W, s B],        of shape (N + P, K + P)
         [A,   0]]

turns each direction into one small and one large product over rows that carry P spare columns:

    forward   u = x A^T,     y  = [x | u]  [W | s B]^T
    backward  v = dy (s B),  dx = [dy | v] [W ; A]

Projections side by side stack their rows of W and A; their B stay in columns of their own.

Shape suffixes: T tokens, K columns in, N columns out, P columns set aside for all ranks, R one rank.
Two letters at the end of a matrix are its rows and columns: NKP has N rows and K + P columns, NPK N + P rows and K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from parley.train_step.matmul import product, takes_whole_weights, whole
from parley.train_step.ops import Adapter, Copy, Ops, Slot


class Base(Protocol):
    """A frozen weight in the form the model keeps it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def write(self, out_NK: Tensor, ops: Ops) -> None:
        """Write the weight, in `out_NK`'s dtype, into the strided `out_NK`."""


@dataclass(frozen=True)
class Dense:
    weight_NK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight_NK.shape[0], self.weight_NK.shape[1]

    def write(self, out_NK: Tensor, ops: Ops) -> None:
        out_NK.copy_(self.weight_NK)


@dataclass(frozen=True)
class Matrix:
    """[W | s B] and [W ; A]: views of one M, or two copies where products take a weight only in one piece."""

    across_NKP: Tensor
    down_NPK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.down_NPK.shape[0], self.across_NKP.shape[1]


@dataclass
class FusedLinear:
    """One matrix for the projections `bases`, with `adapters` (None: not adapted) on them."""

    bases: list[Base]
    adapters: list[Adapter | None]
    bias_N: Tensor | None = None
    granule: int = 1  # the ranks are padded to a multiple of this
    matrix: Matrix | None = None  # M, kept across passes where memory allows
    slots: list[Slot] = field(init=False)

    def __post_init__(self) -> None:
        self.columns_in = self.bases[0].shape[1]
        self.columns_out = sum(base.shape[0] for base in self.bases)
        self.slots, row, rank = [], 0, 0
        for base, adapter in zip(self.bases, self.adapters, strict=True):
            if adapter is not None:
                r = adapter.a_RK.shape[0]
                self.slots.append(Slot(adapter, slice(row, row + base.shape[0]), slice(rank, rank + r)))
                rank += r
            row += base.shape[0]
        self.spare = whole(rank, self.granule)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.columns_out + self.spare, self.columns_in + self.spare

    def matrix_elements(self, *, apart: bool) -> int:
        rows, columns = self.matrix_shape
        return self.columns_out * columns + rows * self.columns_in if apart else rows * columns

    def empty_matrix(self, dtype: torch.dtype, device: torch.device, *, apart: bool) -> Matrix:
        """Room for M; `apart`, for its two halves."""
        rows, columns = self.matrix_shape
        if apart:
            across_NKP = torch.empty(self.columns_out, columns, dtype=dtype, device=device)
            return Matrix(across_NKP, torch.empty(rows, self.columns_in, dtype=dtype, device=device))
        whole = torch.empty(rows, columns, dtype=dtype, device=device)
        return Matrix(whole[: self.columns_out], whole[:, : self.columns_in])

    def fill_base(self, matrix: Matrix, ops: Ops) -> None:
        """Write W into `matrix` and clear the columns and rows that the adapters share."""
        across_NK, down_NK = matrix.across_NKP[:, : self.columns_in], matrix.down_NPK[: self.columns_out]
        row = 0
        for base in self.bases:
            base.write(across_NK[row : row + base.shape[0]], ops)
            row += base.shape[0]
        if down_NK.data_ptr() != across_NK.data_ptr():
            down_NK.copy_(across_NK)
        matrix.across_NKP[:, self.columns_in :].zero_()
        matrix.down_NPK[self.columns_out :].zero_()

    def copies(self, matrix: Matrix) -> Iterator[Copy]:
        """A and s B, which change each step, and their places in `matrix`."""
        for slot in self.slots:
            top = self.columns_out + slot.columns.start
            left = self.columns_in + slot.columns.start
            r = slot.adapter.a_RK.shape[0]
            yield slot.adapter.a_RK, matrix.down_NPK[top : top + r], 1.0
            yield slot.adapter.b_NR, matrix.across_NKP[slot.rows, left : left + r], slot.adapter.scale

    def fill_adapters(self, matrix: Matrix, ops: Ops) -> None:
        for copy in self.copies(matrix):
            ops.copy_scaled(*copy)

    def project(self, matrix: Matrix, x_TKP: Tensor) -> None:
        """Fill the spare columns of `x_TKP` with u, which the forward and the backward pass read."""
        if self.spare:
            x_TK, u_TP = x_TKP[:, : self.columns_in], x_TKP[:, self.columns_in :]
            torch.mm(x_TK, matrix.down_NPK[self.columns_out :].t(), out=u_TP)

    def forward(self, matrix: Matrix, x_TKP: Tensor, room_TN: Tensor) -> Tensor:
        """y of rows whose spare columns `project` has filled, in `room_TN` or in memory of the library's own."""
        return product(x_TKP, matrix.across_NKP, room_TN, self.bias_N)

    def backward(
        self, matrix: Matrix, dy_TNP: Tensor, x_TKP: Tensor, ops: Ops, room_TK: Tensor | None
    ) -> Tensor | None:
        """Add to the adapters' gradients and return dx, in `room_TK` or elsewhere as in `forward`.

        The room may be x itself; None leaves dx out. The spare columns of `dy_TNP` are filled with v.
        """
        if self.spare:
            self._project_back(matrix.across_NKP[:, self.columns_in :], dy_TNP)
        if self.slots:
            ops.add_adapter_gradients(dy_TNP, x_TKP, self.slots, self.columns_out, self.columns_in)
        return None if room_TK is None else product(dy_TNP, matrix.down_NPK.t(), room_TK)

    def _project_back(self, sb_NP: Tensor, dy_TNP: Tensor) -> None:
        """Fill the spare columns of `dy_TNP` with v."""
        dy_TN, v_TP = dy_TNP[:, : self.columns_out], dy_TNP[:, self.columns_out :]
        if sb_NP.is_cuda:  # one launch costs less than what it multiplies by the zeros between the B
            torch.mm(dy_TN, sb_NP, out=v_TP)
            return
        for slot in self.slots:
            torch.mm(dy_TN[:, slot.rows], sb_NP[slot.rows, slot.columns], out=v_TP[:, slot.columns])


class Matrices:
    """Hands out each FusedLinear's matrix: the one it keeps, or one shared with its fellows, filled anew.

    `linears` lists the products of each layer in turn, `per_layer` of them.
    """

    def __init__(
        self, linears: list[FusedLinear], per_layer: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.linears, self.per_layer, self.ops = linears, per_layer, ops
        self.dtype, self.device = dtype, device
        self.apart = takes_whole_weights(dtype, device)
        self.shared: list[Matrix] = []
        self.table: Any = None  # all copies into the kept matrices
        self.holds: list[FusedLinear | None] = [None] * per_layer
        self.place = {id(linear): i % per_layer for i, linear in enumerate(linears)}

    def keep(self) -> None:
        """Build every matrix now and keep it."""
        for linear in self.linears:
            linear.matrix = self._empty(linear)
            linear.fill_base(linear.matrix, self.ops)
        copies = [copy for linear in self.linears if linear.matrix is not None for copy in linear.copies(linear.matrix)]
        self.table = self.ops.copy_table(copies)

    def share(self) -> None:
        """Keep none: one matrix for each product of a layer."""
        self.shared = [self._empty(linear) for linear in self.linears[: self.per_layer]]

    def refresh(self) -> None:
        """Bring the kept matrices up to date with the adapters."""
        self.holds = [None] * self.per_layer
        if self.table is not None:
            self.ops.copy_all(self.table)

    def __getitem__(self, linear: FusedLinear) -> Matrix:
        if linear.matrix is not None:
            return linear.matrix
        place = self.place[id(linear)]
        matrix = self.shared[place]
        if self.holds[place] is not linear:
            if linear.matrix_shape != matrix.shape:  # a layer whose adapters differ from the first one's
                matrix = self.shared[place] = self._empty(linear)
            linear.fill_base(matrix, self.ops)
            linear.fill_adapters(matrix, self.ops)
            self.holds[place] = linear
        return matrix

    def _empty(self, linear: FusedLinear) -> Matrix:
        return linear.empty_matrix(self.dtype, self.device, apart=self.apart)
