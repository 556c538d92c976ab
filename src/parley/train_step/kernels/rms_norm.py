"""RMS norm (arXiv 1910.07467) fused with the residual addition before it. One program per row, the row in registers.

Bytes per row of D 16-bit values: 8 D forward (x and delta in, sum and norm out), 8 D backward. The weight is frozen, so
that no reduction over rows is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel


@kernel()
def _forward(x, delta, total, out, weight, out_stride, eps, D, SUM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * D + d, mask=inside, other=0.0)
    if SUM:
        value = (value.to(tl.float32) + tl.load(delta + row * D + d, mask=inside, other=0.0).to(tl.float32)).to(
            x.dtype.element_ty
        )
        # Rounded to the activations' type before the norm, as a separate addition in transformers is.
        tl.store(total + row * D + d, value, mask=inside)
    f = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=0) / D + eps)
    # Rounded to the weight's type before the product, as transformers does: not at all for a weight in fp32.
    normed = (f * inverse).to(weight.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + d, normed.to(out.dtype.element_ty), mask=inside)


@kernel()
def _backward(dout, x, weight, dx, dout_stride, dx_stride, eps, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    f = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dout + row * dout_stride + d, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=0) / D + eps)
    # dx = (g - f mean(f g) r^2) r with r = 1 / rms and g = dout weight.
    mean = tl.sum(f * g, axis=0) / D * inverse * inverse
    upstream = tl.load(dx + row * dx_stride + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * dx_stride + d, (upstream + (g - f * mean) * inverse).to(dx.dtype.element_ty), mask=inside)


def _shape(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def rms_norm(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    out_TD: Tensor,
    total_TD: Tensor | None = None,
) -> Tensor:
    rows, columns = x_TD.shape
    if delta_TD is None:
        total_TD = x_TD
    elif total_TD is None:
        total_TD = torch.empty_like(x_TD)
    delta = x_TD if delta_TD is None else delta_TD
    _forward[(rows,)](
        x_TD,
        delta,
        total_TD,
        out_TD,
        weight_D,
        out_TD.stride(0),
        eps,
        columns,
        SUM=delta_TD is not None,
        **_shape(columns),
    )
    return total_TD


def rms_norm_backward(dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
    rows, columns = x_TD.shape
    strides = (dout_TD.stride(0), dx_TD.stride(0))
    _backward[(rows,)](dout_TD, x_TD, weight_D, dx_TD, *strides, eps, columns, **_shape(columns))
