"""The inner loops of `gemv`: a tile of weight rows times a few vectors, with weights dense or in NF4.

Every weight is loaded once and multiplied by all vectors while it is in registers. Sums stay apart for each lane until
the end, so that the loops contain loads and multiplications only. The first weights are loaded before the wait for the
previous kernels (see dependent_launch), which x depends on.

Shape suffixes besides docs/design.md's: B is also the number of vectors, padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from parley.inference.cuda.kernels.dependent_launch import COMPILED, wait_for_previous

WORD = tl.constexpr(8)  # 4-bit values of a 32-bit word; a scale holds for a multiple of it

# The eight 4-bit values of a word ($8) as fp32 ($0 to $7). The 16 NF4 values are in registers as fp16, low bytes ($9 to
# $12) apart from high bytes ($13 to $16). `prmt` selects four bytes at a time by three bits of each 4-bit value, once
# from the lower and once from the upper eight table entries, and the fourth bit selects between the two. A table in
# memory would be read for every value, which takes four times as long.
PICK = tl.constexpr("""{
.reg .b32 by3, by1, upper3, upper1, a, b, low, high, pair;
.reg .b16 first, second;
and.b32 by3, $8, 0x77777777;
shr.u32 by1, $8, 1;
and.b32 by1, by1, 0x44444444;
or.b32 by1, by1, 0x32103210;
shr.u32 upper3, by3, 16;
shr.u32 upper1, by1, 16;
prmt.b32 a, $9, $10, by3;
prmt.b32 b, $11, $12, by3;
prmt.b32 low, a, b, by1;
prmt.b32 a, $13, $14, by3;
prmt.b32 b, $15, $16, by3;
prmt.b32 high, a, b, by1;
prmt.b32 pair, low, high, 0x5140;
mov.b32 {second, first}, pair;
cvt.f32.f16 $0, first;
cvt.f32.f16 $1, second;
prmt.b32 pair, low, high, 0x7362;
mov.b32 {second, first}, pair;
cvt.f32.f16 $2, first;
cvt.f32.f16 $3, second;
prmt.b32 a, $9, $10, upper3;
prmt.b32 b, $11, $12, upper3;
prmt.b32 low, a, b, upper1;
prmt.b32 a, $13, $14, upper3;
prmt.b32 b, $15, $16, upper3;
prmt.b32 high, a, b, upper1;
prmt.b32 pair, low, high, 0x5140;
mov.b32 {second, first}, pair;
cvt.f32.f16 $4, first;
cvt.f32.f16 $5, second;
prmt.b32 pair, low, high, 0x7362;
mov.b32 {second, first}, pair;
cvt.f32.f16 $6, first;
cvt.f32.f16 $7, second;
}""")


@triton.jit
def load_x(x, x_stride, norm, k, inside, ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr):
    """x at the columns `k`, (B, 1, K): x times the norm's weight, and x squared for the norm's mean."""
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
    row = weight + n.to(tl.int64)[None, :, None] * K
    mask_n = inside_n[None, :, None]
    first = tl.arange(0, BLOCK_K)[None, None, :]
    w = tl.load(row + first, mask=mask_n & (first < K), other=0.0)
    wait_for_previous()
    value, squares = load_x(x, x_stride, norm, first, first < K, ROWS, B, NORM)
    total = w.to(tl.float32) * value
    for start in range(BLOCK_K, K, BLOCK_K):
        k = start + first
        w = tl.load(row + k, mask=mask_n & (k < K), other=0.0)
        value, square = load_x(x, x_stride, norm, k, k < K, ROWS, B, NORM)
        total += w.to(tl.float32) * value
        squares += square
    return tl.sum(total, axis=2), tl.sum(squares, axis=2)


@triton.jit
def _lookup(word, table, NIBBLE: tl.constexpr):
    """4-bit value number NIBBLE of each word, from the table in memory: for Triton's interpreter."""
    at = (word >> (8 * (NIBBLE // 2) + 4 - 4 * (NIBBLE % 2))) & 15
    bits = tl.load(table + at).to(tl.int16) | (tl.load(table + 16 + at).to(tl.int16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dequantize(word, table):
    """The eight values of each word, in their order, in fp32, before scaling."""
    if COMPILED:
        t = table.to(tl.pointer_type(tl.int32))
        values = tl.inline_asm_elementwise(
            PICK, "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r,r,r,r,r",
            [word, tl.load(t), tl.load(t + 1), tl.load(t + 2), tl.load(t + 3),
             tl.load(t + 4), tl.load(t + 5), tl.load(t + 6), tl.load(t + 7)],
            dtype=(tl.float32,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        values = (
            _lookup(word, table, 0), _lookup(word, table, 1), _lookup(word, table, 2),
            _lookup(word, table, 3), _lookup(word, table, 4), _lookup(word, table, 5),
            _lookup(word, table, 6), _lookup(word, table, 7),
        )  # fmt: skip
    return values


@triton.jit
def _by_nibble(t, B: tl.constexpr, WORDS: tl.constexpr):
    """The columns of `t` (B, 1, 8 WORDS) by their place in a word: eight tensors (B, 1, WORDS). No value moves between
    lanes."""
    even, odd = tl.split(tl.reshape(t, (B, 1, WORDS, 2, 2, 2)))
    by_04, by_26 = tl.split(even)
    by_15, by_37 = tl.split(odd)
    t0, t4 = tl.split(by_04)
    t2, t6 = tl.split(by_26)
    t1, t5 = tl.split(by_15)
    t3, t7 = tl.split(by_37)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def _load_words(words, absmax, row, at, inside, QUANT: tl.constexpr):
    """The words number `at` of each `row`, and their scales (absmax)."""
    word = tl.load(words + (row + at), mask=inside, other=0)
    return word, tl.load(absmax + (row + at) // (QUANT // WORD), mask=inside, other=0.0)


@triton.jit
def nf4(
    x, x_stride, norm, words, absmax, table, n, inside_n, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `dense`, of a weight in bitsandbytes' NF4 layout: two values to a byte, the first in the high half.

    `words` are its bytes in groups of four; `absmax` scales each run of QUANT values (fp32); both may be a pointer for
    each of the rows, (1, N, 1). `table` holds the 16 NF4 values, rounded to fp16: an eighth of bf16's rounding.
    """
    WORDS: tl.constexpr = BLOCK_K // WORD
    total = tl.zeros((B, BLOCK_N, WORDS), tl.float32)
    squares = tl.zeros((B, 1, BLOCK_K), tl.float32)
    row = n[None, :, None] * (K // WORD)  # of words: 32 bits count those of any projection
    mask_n = inside_n[None, :, None]
    # One word per lane, multiplied by the eight columns of x that the same lane has loaded: with words in twos or
    # fours, x would have to move between lanes.
    at = tl.max_contiguous(tl.arange(0, WORDS)[None, None, :], [1, 1, 1])
    word, scale = _load_words(words, absmax, row, at, mask_n & (at < K // WORD), QUANT)
    wait_for_previous()
    # Software pipelining: the next words are loaded while these are dequantized. `dense` has no registers for that.
    for start in range(0, K // WORD, WORDS):
        after = tl.max_contiguous(start + WORDS + tl.arange(0, WORDS)[None, None, :], [1, 1, 1])
        next_word, next_scale = _load_words(words, absmax, row, after, mask_n & (after < K // WORD), QUANT)
        k = WORD * start + tl.arange(0, BLOCK_K)[None, None, :]
        value, square = load_x(x, x_stride, norm, k, k < K, ROWS, B, NORM)
        squares += square
        values, weights = _by_nibble(value, B, WORDS), _dequantize(word, table)
        product = tl.zeros((B, BLOCK_N, WORDS), tl.float32)
        for nibble in tl.static_range(WORD):
            product += weights[nibble] * values[nibble]
        total += product * scale
        word, scale = next_word, next_scale
    return tl.sum(total, axis=2), tl.sum(squares, axis=2)


@triton.jit
def any_weight(
    x, x_stride, norm, weight, absmax, table, n, inside_n, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`nf4` where QUANT says how many values share a scale, `dense` where it is zero."""
    if QUANT:
        words = weight.to(tl.pointer_type(tl.int32))
        total, squares = nf4(
            x, x_stride, norm, words, absmax, table, n, inside_n, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
        )
    else:
        total, squares = dense(x, x_stride, norm, weight, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
    return total, squares
