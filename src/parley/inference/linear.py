"""Projections that read the same rows, for answering: y = x W^T + t (x A^T) (s B)^T, with t one or zero for each row.

The adapter stays beside the weights, so that rows of the base model and of the tuned one stand side by side. Where all
rows speak in one voice, a CPU takes W or W + s B A alone (`in_voice`).

Shape suffixes: T rows, K columns in, N columns out, P all ranks side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from parley.train_step.bind import ModelWeights
from parley.train_step.fused_linear import DenseWeight, FusedLinear
from parley.train_step.ops import Ops

SHARE_OF_FREE = 0.5  # of the free memory may go to copies of weights


class Product:
    """One FusedLinear, with its adapters' weights copied in the model's type as they are now.

    `matrix_NK` is W in one piece, where it is so in the model or has been copied; `packed` is it once more, in oneDNN's
    order, for many rows on a CPU. Where W is in pieces, each projection is a product of its own, 4-bit ones unpacked
    into `scratch` first.
    """

    def __init__(self, linear: FusedLinear, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self.linear, self.ops, self.dtype, self.device = linear, ops, dtype, device
        self.matrix_NK: Tensor | None = None
        self.packed: Tensor | None = None
        self.scratch: Tensor | None = None
        first = linear.bases[0]
        if len(linear.bases) == 1 and isinstance(first, DenseWeight):
            self.matrix_NK = first.weight_NK
        self.a_PK: Tensor | None = None
        self.sb_NP: Tensor | None = None
        if linear.adapter_slices:
            self._copy_adapters(linear)

    def _copy_adapters(self, linear: FusedLinear) -> None:
        ranks = linear.adapter_slices[-1].columns.stop
        self.a_PK = torch.empty(ranks, linear.in_features, dtype=self.dtype, device=self.device)
        self.sb_NP = torch.zeros(linear.out_features, ranks, dtype=self.dtype, device=self.device)
        for slot in linear.adapter_slices:
            self.a_PK[slot.columns] = slot.adapter.a_RK
            self.sb_NP[slot.rows, slot.columns] = slot.adapter.scale * slot.adapter.b_NR.float()

    @property
    def copy_bytes(self) -> int:
        """What `copy` would take."""
        copies = int(self.matrix_NK is None)
        if self.on_cpu:  # W and its packed form, and both once more with the adapter merged in
            copies += 1 if self.a_PK is None else 3
        return copies * self.linear.out_features * self.linear.in_features * self.dtype.itemsize

    @property
    def on_cpu(self) -> bool:
        """Whether rows take the products of a CPU in float32."""
        return self.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def copy(self) -> None:
        """Lay W out in one piece, unpacked; on a CPU in oneDNN's order too.

        Between the other operations of a pass, 26 rows take 1.3 ms in oneDNN's order through all products of the
        embedded model and 2.4 through MKL (two Zen 5 cores).
        """
        if self.matrix_NK is None:
            rows, columns = self.linear.out_features, self.linear.in_features
            self.matrix_NK = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
            row = 0
            for base in self.linear.bases:
                base.copy_into(self.matrix_NK[row : row + base.shape[0]], self.ops)
                row += base.shape[0]
        if self.on_cpu:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix_NK.detach())

    def in_voice(self, *, tuned: bool) -> Product:
        """The same for rows of one voice, without an adapter beside it. Copied before."""
        assert self.matrix_NK is not None
        if self.a_PK is None or self.sb_NP is None:
            return self
        matrix_NK = torch.addmm(self.matrix_NK, self.sb_NP, self.a_PK) if tuned else self.matrix_NK
        one = Product(
            FusedLinear([DenseWeight(matrix_NK)], [None], self.linear.bias_N), self.ops, self.dtype, self.device
        )
        if tuned:
            one.copy()
        else:
            one.packed = self.packed
        return one

    def _pieces(self) -> Iterator[tuple[Tensor, slice]]:
        """W by pieces: each with the columns of y that it gives."""
        column = 0
        for base in self.linear.bases:
            rows, in_features = base.shape
            if isinstance(base, DenseWeight):
                weight_NK = base.weight_NK
            else:
                assert self.scratch is not None
                weight_NK = self.scratch[: rows * in_features].view(rows, in_features)
                base.copy_into(weight_NK, self.ops)
            yield weight_NK, slice(column, column + rows)
            column += rows

    def __call__(self, x_TK: Tensor, tuned_T1: Tensor) -> Tensor:
        """y_TN."""
        bias_N = self.linear.bias_N
        if self.packed is not None and x_TK.shape[0] > 1:
            y_TN = torch.ops.mkldnn._linear_pointwise(x_TK, self.packed, bias_N, "none", [], "")
        elif self.matrix_NK is not None:
            y_TN = functional.linear(x_TK, self.matrix_NK, bias_N)
        else:
            y_TN = x_TK.new_empty(x_TK.shape[0], self.linear.out_features)
            for weight_NK, columns in self._pieces():
                torch.mm(x_TK, weight_NK.t(), out=y_TN[:, columns])
            if bias_N is not None:
                y_TN += bias_N
        return self._adapt(x_TK, tuned_T1, y_TN)

    def add_to(self, h_TN: Tensor, x_TK: Tensor, tuned_T1: Tensor) -> None:
        """h += y, in place."""
        if self.packed is not None and x_TK.shape[0] > 1:
            h_TN += self(x_TK, tuned_T1)
            return
        if self.matrix_NK is not None:
            h_TN.addmm_(x_TK, self.matrix_NK.t())
        else:
            for weight_NK, columns in self._pieces():
                h_TN[:, columns].addmm_(x_TK, weight_NK.t())
        if self.linear.bias_N is not None:
            h_TN += self.linear.bias_N
        self._adapt(x_TK, tuned_T1, h_TN)

    def _adapt(self, x_TK: Tensor, tuned_T1: Tensor, y_TN: Tensor) -> Tensor:
        if self.a_PK is None or self.sb_NP is None:
            return y_TN
        u_TP = torch.mm(x_TK, self.a_PK.t()).mul_(tuned_T1)
        return y_TN.addmm_(u_TP, self.sb_NP.t())


class LayerProducts:
    """The four products of a decoder layer."""

    def __init__(self, qkv: Product, o: Product, gate_up: Product, down: Product) -> None:
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down

    @property
    def all(self) -> tuple[Product, Product, Product, Product]:
        return self.qkv, self.o, self.gate_up, self.down

    def in_voice(self, *, tuned: bool) -> LayerProducts:
        return LayerProducts(*(product.in_voice(tuned=tuned) for product in self.all))


@torch.no_grad()
def make_products(weights: ModelWeights, ops: Ops, *, copies: bool) -> tuple[list[LayerProducts], Product]:
    """The products of each layer, and the head.

    `copies`: lay each out in one piece, unpacked, where half of the free memory holds them all; else 4-bit weights
    are unpacked at each use into one buffer that all share.
    """
    layers = [
        LayerProducts(
            *(
                Product(linear, ops, weights.dtype, weights.device)
                for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
            )
        )
        for layer in weights.layers
    ]
    head = Product(FusedLinear([DenseWeight(weights.head_VD)], [None]), ops, weights.dtype, weights.device)
    products = [head, *(product for layer in layers for product in layer.all)]
    if copies and sum(product.copy_bytes for product in products) < SHARE_OF_FREE * _free_bytes(weights.device):
        for product in products:
            product.copy()
    packed = [
        base.shape[0] * base.shape[1]
        for product in products
        if product.matrix_NK is None
        for base in product.linear.bases
        if not isinstance(base, DenseWeight)
    ]
    if packed:
        scratch = torch.empty(max(packed), dtype=weights.dtype, device=weights.device)
        for product in products:
            product.scratch = scratch
    return layers, head


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
