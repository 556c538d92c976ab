"""NF4 dequantization straight into a strided matrix: one program per row and run of BLOCK bytes.

Layout (bitsandbytes): row-major, two values to a byte, the first in the high nibble; one absmax for each QUANT_BLOCK
consecutive values, across rows. For N x K values N K / 2 bytes are read and 2 N K written in bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel


@kernel()
def _dequantize(packed, absmax, code, out, out_stride, K, QUANT_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # a byte holds columns 2 * half and 2 * half + 1
    inside = half < K // 2
    at = row * (K // 2) + half
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + at * 2 // QUANT_BLOCK, mask=inside, other=0.0)
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    k = tl.program_id(1) * BLOCK * 2 + tl.arange(0, BLOCK * 2)
    value = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + k, value, mask=k < K)


def dequantize_nf4(packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
    rows, columns = out_NK.shape
    assert columns % 2 == 0
    size = min(triton.next_power_of_2(columns // 2), 1024)
    grid = (rows, triton.cdiv(columns // 2, size))
    _dequantize[grid](packed, absmax, code, out_NK, out_NK.stride(0), columns, QUANT_BLOCK=block, BLOCK=size)
