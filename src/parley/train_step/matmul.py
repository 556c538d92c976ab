"""The large matrix products of a step.

Shape suffixes (legend in docs/design.md): T tokens, K input features, N output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parley.library_compat.torch import onednn_linear

# oneDNN generates code for each number of rows, in 0.2 to 0.6 ms: padding to a multiple keeps these few.
ONEDNN_ROW_MULTIPLE = 8


def uses_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `linear` goes through oneDNN, which takes no weight that is a slice of a wider one: float32 on a CPU."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def linear(x_TK: Tensor, weight_NK: Tensor, out_TN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + bias, in `out_TN`, which may be strided, or in memory that oneDNN allocates.

    oneDNN gets a copy of a sliced weight.
    """
    if uses_onednn(weight_NK.dtype, weight_NK.device):
        if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
            weight_NK = weight_NK.contiguous()
        return onednn_linear(x_TK, weight_NK, bias_N)
    if bias_N is None:
        return torch.mm(x_TK, weight_NK.t(), out=out_TN)
    return torch.addmm(bias_N, x_TK, weight_NK.t(), out=out_TN)


def copy_if_elsewhere(result_TN: Tensor, out_TN: Tensor) -> Tensor:
    """`out_TN`, with `result_TN` copied into it unless that is where it lies already."""
    return out_TN if result_TN.data_ptr() == out_TN.data_ptr() else out_TN.copy_(result_TN)
