"""Some rows of a weight times a few vectors: the inner loops of `rows`.

Every weight is read once, 16 bytes a lane, and all vectors are multiplied while it is in registers. Sums stay apart for
each lane until the end, so that the loops hold nothing but loads and multiplications.

Shape suffixes: B vectors, N rows of a tile, K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUN = tl.constexpr(8)  # packed bytes that one lane sums before they are scaled; a scale holds for a multiple of it


@triton.jit
def vectors(x, x_stride, norm, k, inside, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr):
    """x at the columns `k`, (B, 1, K): (x times the norm's weight, x squared)."""
    b = tl.arange(0, B)[:, None, None]
    value = tl.load(x + b * x_stride + k, mask=(b < ROWS) & inside, other=0.0).to(tl.float32)
    square = value * value
    if NORM:
        value *= tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def dense(
    x, x_stride, norm, weight, n, inside_n, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products (B, N) of the rows `n` of `weight` (N, K), and the vectors' sums of squares (B, 1)."""
    total = tl.zeros((B, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((B, 1, BLOCK_K), tl.float32)
    row = weight + n.to(tl.int64)[None, :, None] * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, None, :]
        inside = k < K
        w = tl.load(row + k, mask=inside_n[None, :, None] & inside, other=0.0).to(tl.float32)
        value, square = vectors(x, x_stride, norm, k, inside, ROWS, B, NORM)
        total += w * value
        squares += square
    return tl.sum(total, axis=2), tl.sum(squares, axis=2)


@triton.jit
def nf4(
    x, x_stride, norm, packed, absmax, code, n, inside_n, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `dense`, of a weight as bitsandbytes packs it: two values to a byte, the first in the high half.

    `absmax` scales each run of QUANT values (fp32).
    """
    HALF: tl.constexpr = BLOCK_K // 2
    RUNS: tl.constexpr = HALF // RUN
    total = tl.zeros((B, BLOCK_N, RUNS), tl.float32)
    squares = tl.zeros((B, 1, BLOCK_K), tl.float32)
    row = n.to(tl.int64)[None, :, None] * (K // 2)
    for start in range(0, K // 2, HALF):
        half = start + tl.arange(0, HALF)[None, None, :]
        run = start + tl.arange(0, RUNS)[None, None, :] * RUN
        k = 2 * start + tl.arange(0, BLOCK_K)[None, None, :]
        byte = tl.load(packed + row + half, mask=inside_n[None, :, None] & (half < K // 2), other=0).to(tl.int32)
        scale = tl.load(absmax + (row + run) // (QUANT // 2), mask=inside_n[None, :, None] & (run < K // 2), other=0.0)
        value, square = vectors(x, x_stride, norm, k, k < K, ROWS, B, NORM)
        first, second = tl.split(tl.reshape(value, (B, 1, HALF, 2)))
        product = tl.load(code + (byte >> 4)) * first + tl.load(code + (byte & 15)) * second
        total += tl.sum(tl.reshape(product, (B, BLOCK_N, RUNS, RUN)), axis=3) * scale
        squares += square
    return tl.sum(total, axis=2), tl.sum(squares, axis=2)


@triton.jit
def any_weight(
    x, x_stride, norm, weight, absmax, code, n, inside_n, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`nf4` where QUANT says how many values share a scale, `dense` where it is zero."""
    if QUANT:
        total, squares = nf4(
            x, x_stride, norm, weight, absmax, code, n, inside_n, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
        )
    else:
        total, squares = dense(x, x_stride, norm, weight, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
    return total, squares
