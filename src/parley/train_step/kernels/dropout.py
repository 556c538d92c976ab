"""LoRA dropout, whose mask is never stored: the backward pass computes it again.

A mask is a function of the pass's seed, read on the device so that a CUDA graph can be replayed with another, the
stream (one a projection) and the element: Philox-4x32-10 (Salmon et al., 2011), of which each call gives the random
numbers of four elements.

Shape suffixes: T tokens, K input features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel

BLOCK = 256  # calls of the generator a program, which has four times as many columns


@triton.jit
def _store_kept(x, out, k, kept, K, scale, ADD: tl.constexpr):
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    value = tl.where(kept, value * scale, 0.0)
    if ADD:
        value += tl.load(out + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + k, value.to(out.dtype.element_ty), mask=k < K)


@kernel("stream", "first_row")
def _dropout(
    x, out, seed, stream, first_row, p, scale, x_stride, out_stride, K, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += row * x_stride
    out += row * out_stride
    i = tl.arange(0, BLOCK)
    key = (tl.load(seed).to(tl.int64) << 32) + stream
    counter = ((row + first_row) * tl.num_programs(1) + part) * BLOCK + i
    first, second, third, fourth = tl.rand4x(key, counter)
    k = part * (4 * BLOCK) + i
    _store_kept(x, out, k, first >= p, K, scale, ADD)
    _store_kept(x, out, k + BLOCK, second >= p, K, scale, ADD)
    _store_kept(x, out, k + 2 * BLOCK, third >= p, K, scale, ADD)
    _store_kept(x, out, k + 3 * BLOCK, fourth >= p, K, scale, ADD)


def dropout(
    x_TK: Tensor, out_TK: Tensor, seed: Tensor, stream: int, p: float, first_row: int = 0, *, add: bool = False
) -> None:
    rows, columns = x_TK.shape
    _dropout[(rows, triton.cdiv(columns, 4 * BLOCK))](
        x_TK, out_TK, seed, stream, first_row, p, 1.0 / (1.0 - p), x_TK.stride(0), out_TK.stride(0), columns,
        ADD=add, BLOCK=BLOCK,
    )  # fmt: skip
