"""Linear layers that read the same input, for decoding: y = x W^T + (t x A^T) (s B)^T, with t one or zero for each row.

The LoRA weights stay beside W, so that rows of the base model and of the adapter share one batch: t is a row's field
ADAPTER (see slot_state).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from parley.library_compat.torch import onednn_linear, onednn_pack_weight
from parley.train_step.bind import ModelWeights
from parley.train_step.fused_linear import DenseWeight, FusedLinear
from parley.train_step.matmul import uses_onednn
from parley.train_step.ops import Ops

FREE_MEMORY_SHARE = 0.5  # of the free memory, for each kind of copies of weights: fused, packed


class DecodeLinear:
    """One FusedLinear, with a copy of its adapters' weights, as they are now, in the model's dtype.

    `weight_NK` is W in one matrix, where the model has it so or `fuse` has made it. Without it each projection is a
    product of its own, 4-bit ones dequantized into `dequant_buffer` first. `packed` is W once more in oneDNN's blocked
    layout, where `pack` has made it.
    """

    def __init__(self, linear: FusedLinear, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self.linear, self.ops, self.dtype, self.device = linear, ops, dtype, device
        self.weight_NK: Tensor | None = None
        self.packed: Tensor | None = None
        self.dequant_buffer: Tensor | None = None
        first = linear.bases[0]
        if len(linear.bases) == 1 and isinstance(first, DenseWeight):
            self.weight_NK = first.weight_NK
        self.a_PK: Tensor | None = None
        self.sb_NP: Tensor | None = None  # s B of each projection, on the block diagonal
        if linear.adapter_slices:
            self.copy_adapters(linear)

    def copy_adapters(self, linear: FusedLinear) -> None:
        """Copy the adapters of `linear`, which are those of this layer. A later copy keeps the addresses of the first,
        which captured graphs read."""
        if self.a_PK is None or self.sb_NP is None:
            ranks = linear.adapter_slices[-1].columns.stop
            self.a_PK = torch.empty(ranks, linear.in_features, dtype=self.dtype, device=self.device)
            self.sb_NP = torch.zeros(linear.out_features, ranks, dtype=self.dtype, device=self.device)
        for part in linear.adapter_slices:
            self.a_PK[part.columns] = part.adapter.a_RK
            # Scaled in fp32 and rounded once.
            self.sb_NP[part.rows, part.columns] = part.adapter.scale * part.adapter.b_NR.float()

    @property
    def weight_bytes(self) -> int:
        """Memory of one dense copy of W."""
        return self.linear.out_features * self.linear.in_features * self.dtype.itemsize

    def fuse(self) -> None:
        """Copy W into one matrix, dequantized."""
        shape = self.linear.out_features, self.linear.in_features
        self.weight_NK = torch.empty(shape, dtype=self.dtype, device=self.device)
        row = 0
        for base in self.linear.bases:
            base.copy_into(self.weight_NK[row : row + base.shape[0]], self.ops)
            row += base.shape[0]

    def pack(self) -> None:
        """Lay W, which is one matrix, out for a CPU: a copy for oneDNN, and a fused W with contiguous columns."""
        assert self.weight_NK is not None
        self.packed = onednn_pack_weight(self.weight_NK.detach())
        if len(self.linear.bases) > 1:  # a copy of fuse, not the model's own
            # For one row MKL then takes half the time: it sums scaled columns of W, without a reduction per feature.
            self.weight_NK = self.weight_NK.t().contiguous().t()

    def __call__(self, x_TK: Tensor, adapter_T1: Tensor | None) -> Tensor:
        """y_TN. `adapter_T1`: t of each row; None leaves the adapter out."""
        if self.weight_NK is None:
            y_TN = self._by_projection(x_TK)
        elif self._uses_packed(x_TK):
            y_TN = onednn_linear(x_TK, self.packed, self.linear.bias_N)
        else:
            y_TN = functional.linear(x_TK, self.weight_NK, self.linear.bias_N)
        return self._add_lora(x_TK, adapter_T1, y_TN)

    def add_to(self, h_TN: Tensor, x_TK: Tensor, adapter_T1: Tensor | None) -> None:
        """h += y, in place."""
        # oneDNN has no accumulating product, and without W in one matrix there are several products.
        if self.weight_NK is None or self._uses_packed(x_TK):
            h_TN += self(x_TK, adapter_T1)
            return
        h_TN.addmm_(x_TK, self.weight_NK.t())
        if self.linear.bias_N is not None:
            h_TN += self.linear.bias_N
        self._add_lora(x_TK, adapter_T1, h_TN)

    def _uses_packed(self, x_TK: Tensor) -> bool:
        """From two rows on. For one row a product only reads W, and MKL's call costs less."""
        return self.packed is not None and x_TK.shape[0] > 1

    def _by_projection(self, x_TK: Tensor) -> Tensor:
        y_TN = x_TK.new_empty(x_TK.shape[0], self.linear.out_features)
        for weight_NK, columns in self._projections():
            torch.mm(x_TK, weight_NK.t(), out=y_TN[:, columns])
        if self.linear.bias_N is not None:
            y_TN += self.linear.bias_N
        return y_TN

    def _projections(self) -> Iterator[tuple[Tensor, slice]]:
        """Each projection's weight, dequantized, with its columns of y. The next one may overwrite its memory."""
        column = 0
        for base in self.linear.bases:
            rows, in_features = base.shape
            if isinstance(base, DenseWeight):
                weight_NK = base.weight_NK
            else:
                assert self.dequant_buffer is not None
                weight_NK = self.dequant_buffer[: rows * in_features].view(rows, in_features)
                base.copy_into(weight_NK, self.ops)
            yield weight_NK, slice(column, column + rows)
            column += rows

    def _add_lora(self, x_TK: Tensor, adapter_T1: Tensor | None, y_TN: Tensor) -> Tensor:
        if self.a_PK is None or self.sb_NP is None or adapter_T1 is None:
            return y_TN
        u_TP = torch.mm(x_TK, self.a_PK.t()).mul_(adapter_T1)
        return y_TN.addmm_(u_TP, self.sb_NP.t())


class LayerLinears:
    """The four linear layers of a decoder layer."""

    def __init__(self, qkv: DecodeLinear, o: DecodeLinear, gate_up: DecodeLinear, down: DecodeLinear) -> None:
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down

    @property
    def all(self) -> tuple[DecodeLinear, DecodeLinear, DecodeLinear, DecodeLinear]:
        return self.qkv, self.o, self.gate_up, self.down


@torch.no_grad()
def make_linears(
    weights: ModelWeights, ops: Ops, *, fuse: bool, fused_NK: Sequence[Tensor] | None = None
) -> tuple[list[LayerLinears], DecodeLinear]:
    """The linear layers of each decoder layer, and the head.

    Args:
        fuse: copy each W into one matrix, dequantized, where half of the free memory holds them all. Otherwise 4-bit
            weights are dequantized at each use, into one buffer that all share.
        fused_NK: these matrices, which the caller has and keeps, in the order of `weights.linears`.
    """
    layers = [
        LayerLinears(
            *(
                DecodeLinear(linear, ops, weights.dtype, weights.device)
                for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
            )
        )
        for layer in weights.layers
    ]
    head = DecodeLinear(FusedLinear([DenseWeight(weights.head_VD)], [None]), ops, weights.dtype, weights.device)
    linears = [head, *(linear for layer in layers for linear in layer.all)]
    for linear, weight_NK in zip(linears[1:], fused_NK or (), strict=fused_NK is not None):
        linear.weight_NK = weight_NK
    unfused = [linear for linear in linears if linear.weight_NK is None]
    if fuse and _copies_fit(unfused, weights.device):
        for linear in unfused:
            linear.fuse()
        if uses_onednn(weights.dtype, weights.device) and _copies_fit(linears, weights.device):
            for linear in linears:
                linear.pack()
    quantized = [
        base.shape[0] * base.shape[1]
        for linear in linears
        if linear.weight_NK is None
        for base in linear.linear.bases
        if not isinstance(base, DenseWeight)
    ]
    if quantized:
        buffer = torch.empty(max(quantized), dtype=weights.dtype, device=weights.device)
        for linear in linears:
            linear.dequant_buffer = buffer
    return layers, head


def _copies_fit(linears: Sequence[DecodeLinear], device: torch.device) -> bool:
    return sum(linear.weight_bytes for linear in linears) < FREE_MEMORY_SHARE * _free_bytes(device)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch's reserved but unused memory counts as used for the driver, and can be allocated all the same.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
