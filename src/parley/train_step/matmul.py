"""The large matrix products of a step.

Shape suffixes: T tokens, K columns in, N columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 8  # oneDNN writes a program for each number of rows, 0.2 to 0.6 ms each: whole multiples keep them few


def whole(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def takes_whole_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `product` goes through oneDNN, which has no kernel for a weight that is a slice of a wider one.

    In float32 on a CPU, as in torch.compile: on AMD's processors it takes half the time of the MKL that torch.mm calls
    there (430 and 200 GFLOP/s on two Zen 5 cores).
    """
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(x_TK: Tensor, weight_NK: Tensor, room_TN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias, in `room_TN`, which may be strided, or in memory of oneDNN's own.

    oneDNN gets a copy of a sliced weight.
    """
    if takes_whole_weights(weight_NK.dtype, weight_NK.device):
        if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
            weight_NK = weight_NK.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
    if bias_N is None:
        return torch.mm(x_TK, weight_NK.t(), out=room_TN)
    return torch.addmm(bias_N, x_TK, weight_NK.t(), out=room_TN)


def put(result_TN: Tensor, out_TN: Tensor) -> Tensor:
    """A product's result in `out_TN`, where it may be already."""
    return out_TN if result_TN.data_ptr() == out_TN.data_ptr() else out_TN.copy_(result_TN)
