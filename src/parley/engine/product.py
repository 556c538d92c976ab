"""The large matrix products of a step.

Shape suffixes: T tokens, K columns in, N columns out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(x_TK: Tensor, weight_NK: Tensor, out_TN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Write x W^T + bias into `out_TN`, which may be strided, and return it.

    In float32 on a CPU through oneDNN, as torch.compile does it: on AMD's processors it takes half the time of the MKL
    that torch.mm calls there (430 and 200 GFLOP/s on two Zen 5 cores). It has no kernel for a weight that is a slice
    of a wider one, so such a weight is copied first.
    """
    if weight_NK.device.type == "cpu" and weight_NK.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
            weight_NK = weight_NK.contiguous()
        return out_TN.copy_(torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], ""))
    if bias_N is None:
        return torch.mm(x_TK, weight_NK.t(), out=out_TN)
    return torch.addmm(bias_N, x_TK, weight_NK.t(), out=out_TN)
