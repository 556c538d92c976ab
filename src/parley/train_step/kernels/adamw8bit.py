"""AdamW with 8-bit block-wise moments (arXiv 2110.02861), in the layout of bitsandbytes.

bitsandbytes' own kernel takes ten times as long as its memory traffic: it looks each moment up in a code book by binary
search. Here the code is computed. One program updates ROWS blocks of 256 weights: it reads their codes and scales,
updates moments and weights in fp32, and writes the moments with each block's new largest magnitude as its scale.
Programs share nothing.

A code book is a dynamic tree: seven decades i of n = 2^i (signed) or 2^(i + 1) (unsigned) equidistant values
10^(i - 6) (0.1 + 0.9 (k + 1/2) / n), k = 0 .. n - 1, below them 0 and above them 1. Negative values mirror them.

Shape suffixes: Z weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel

BLOCK = tl.constexpr(256)  # weights that share a scale, fixed by bitsandbytes
ROWS = 4  # blocks of a program
LOG10_2, LOG2_10 = tl.constexpr(0.30102999566398120), tl.constexpr(3.3219280948873623)


@triton.jit
def _code_above_zero(a, FIRST_ITEMS: tl.constexpr):
    """The nearest code of a in [0, 1], counted from the code of 0; decade 0 has FIRST_ITEMS values."""
    decade = tl.minimum(tl.maximum(tl.floor(tl.log2(tl.maximum(a, 1e-30)) * LOG10_2) + 7.0, 0.0), 6.0)
    items = (FIRST_ITEMS << decade.to(tl.int32)).to(tl.float32)
    u = a * tl.exp2((6.0 - decade) * LOG2_10)  # in [0.1, 1) but for decade 0
    k = tl.minimum(tl.maximum(tl.floor((u - 0.1) * (items / 0.9)), 0.0), items - 1.0)
    # Next to the value before the decade's first, which is 0 or the last of the decade below with half its density.
    before = tl.where(decade == 0.0, 0.05 + 0.225 / items, 0.1 + 0.18 / items)
    k = tl.where(u < before, -1.0, k)
    k = tl.where((decade == 6.0) & (u > 1.0 - 0.225 / items), items, k)  # the value 1 ends the book
    return (items - FIRST_ITEMS + 1.0 + k).to(tl.int32)


@kernel()
def _adamw8bit(
    weight, gradient, m_code, v_code, m_scale, v_scale, m_book, v_book, finite, Z, beta1, beta2, step_size, eps, decay,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    Z = Z * tl.load(finite).to(tl.int32)  # 0: all are masked
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = z < Z
    first = block.to(tl.int64) * BLOCK < Z
    g = tl.load(gradient + z, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_book + tl.load(m_code + z, mask=inside, other=0).to(tl.int32))
    v = tl.load(v_book + tl.load(v_code + z, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(m_scale + block, mask=first, other=0.0)[:, None]
    v = v * tl.load(v_scale + block, mask=first, other=0.0)[:, None]
    m = tl.where(inside, beta1 * m + (1.0 - beta1) * g, 0.0)
    v = tl.where(inside, beta2 * v + (1.0 - beta2) * g * g, 0.0)
    w = tl.load(weight + z, mask=inside, other=0.0).to(tl.float32)
    w = w * decay + step_size * (m / (tl.sqrt(v) + eps))
    tl.store(weight + z, w.to(weight.dtype.element_ty), mask=inside)
    m_max = tl.max(tl.abs(m), axis=1)
    v_max = tl.max(v, axis=1)
    tl.store(m_scale + block, m_max, mask=first)
    tl.store(v_scale + block, v_max, mask=first)
    # A block of zeros has scale 0; its codes are of no consequence, but finite.
    above = _code_above_zero(tl.abs(m) / tl.maximum(m_max, 1e-38)[:, None], 1)
    # A negative moment keeps its sign where it is nearest to 0; there is no code of -1.
    below = tl.minimum(tl.maximum(above, 1), 127)
    tl.store(m_code + z, tl.where(m < 0.0, 127 - below, 127 + above).to(tl.uint8), mask=inside)
    v_above = _code_above_zero(v / tl.maximum(v_max, 1e-38)[:, None], 2)
    tl.store(v_code + z, tl.minimum(v_above, 255).to(tl.uint8), mask=inside)


def adamw8bit(
    weight_Z: Tensor,
    gradient_Z: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    books: tuple[Tensor, Tensor],
    finite: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update of contiguous weights of any shape, in place. `step` counts from 1.

    `finite`: 0-dim bool on the weights' device; where it is False nothing is written.
    """
    correction1, correction2 = 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5
    programs = triton.cdiv(weight_Z.numel(), BLOCK.value * ROWS)
    _adamw8bit[(programs,)](
        weight_Z, gradient_Z, *moments, *scales, *books, finite.view(torch.uint8), weight_Z.numel(), *betas,
        -lr * correction2 / correction1, correction2 * eps, 1 - lr * weight_decay, BLOCK=BLOCK, ROWS=ROWS,
    )  # fmt: skip
