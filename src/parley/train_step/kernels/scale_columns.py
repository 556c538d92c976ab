"""DoRA's scale of each output feature, forward and backward.

Forward: one program per row and run of columns. Backward: one program per run of columns walks all rows; the rows of
few columns are shared by several programs (split_reduction.py).

Shape suffixes: T tokens, N output features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.split_reduction import FULL_OCCUPANCY, is_last_to_arrive

BLOCK, ROWS = 1024, 16  # columns of a program forward, rows of a tile backward
BLOCK_BACKWARD = 128
MAX_SPLITS = 16


@kernel()
def _scale_columns(x, scale, bias, x_stride, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = x + tl.program_id(0).to(tl.int64) * x_stride + n
    value = tl.load(at, mask=n < N, other=0.0).to(tl.float32) * tl.load(scale + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(at, value.to(x.dtype.element_ty), mask=n < N)


@kernel()
def _scale_columns_backward(
    dy, y, scale, bias, dot, partials, arrivals, dy_stride, y_stride, T, N, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    split = tl.program_id(1)
    rows = tl.cdiv(tl.cdiv(T, SPLITS), ROWS) * ROWS
    until = tl.minimum((split + 1) * rows, T)
    factor = tl.load(scale + n, mask=inside, other=0.0)[None, :]
    offset = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(split * rows, until, ROWS):
        t = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        both = (t < until) & inside[None, :]
        d = tl.load(dy + t * dy_stride + n[None, :], mask=both, other=0.0).to(tl.float32)
        z = tl.load(y + t * y_stride + n[None, :], mask=both, other=0.0).to(tl.float32) - offset
        total += tl.sum(d * z, axis=0)
        tl.store(dy + t * dy_stride + n[None, :], (d * factor).to(dy.dtype.element_ty), mask=both)
    last = True
    if SPLITS > 1:
        tl.store(partials + split * N + n, total, mask=inside)
        last = is_last_to_arrive(arrivals + tl.program_id(0), SPLITS)
        if last:
            total = tl.zeros((BLOCK,), tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(partials + other * N + n, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        tl.store(dot + n, total, mask=inside)


def scale_columns(x_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
    rows, columns = x_TN.shape
    bias = scale_N if bias_N is None else bias_N  # without a bias a placeholder that is not read
    _scale_columns[(rows, triton.cdiv(columns, BLOCK))](
        x_TN, scale_N, bias, x_TN.stride(0), columns, HAS_BIAS=bias_N is not None, BLOCK=BLOCK
    )


def scale_columns_backward(dy_TN: Tensor, y_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None, dot_N: Tensor) -> None:
    tokens, columns = dy_TN.shape
    programs = triton.cdiv(columns, BLOCK_BACKWARD)
    splits = _splits(programs)
    partials, arrivals = dot_N, dot_N  # placeholders: neither is read without splits
    if splits > 1:
        partials = dot_N.new_empty(splits * columns)
        arrivals = torch.zeros(programs, dtype=torch.int32, device=dot_N.device)
    bias = scale_N if bias_N is None else bias_N
    _scale_columns_backward[(programs, splits)](
        dy_TN, y_TN, scale_N, bias, dot_N, partials, arrivals, dy_TN.stride(0), y_TN.stride(0), tokens, columns,
        HAS_BIAS=bias_N is not None, BLOCK=BLOCK_BACKWARD, ROWS=ROWS, SPLITS=splits,
    )  # fmt: skip


def _splits(programs: int) -> int:
    """How many programs share the tokens of some columns: a power of two, since each number is compiled by itself."""
    splits = max(min(2 * FULL_OCCUPANCY // programs, MAX_SPLITS), 1)
    return 1 << (splits.bit_length() - 1)
