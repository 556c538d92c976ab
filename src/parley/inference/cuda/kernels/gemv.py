"""Products of a row or two, bound by reading the weights: one kernel each, with what stands around it.

    product   y = W norm(x) + bias + t s B (A norm(x)), or h += the same    (up to three W side by side)
    gated     y = silu(g) u, with g and u each such a product

A norm's weight goes along with x and its inverse root comes after the sum, as it is one number a row. The adapter's
u = A norm(x) is computed by the first programs of the same launch; the others wait for it when they are done with W,
as a program of a lower number never waits and is dispatched first.

Shape suffixes: B rows, K columns in, N columns out, P all ranks side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference.cuda.kernels.dependent_launch import early, next_may_come
from parley.inference.cuda.kernels.gemv_tiles import any_weight, dense, nf4
from parley.inference.linear import Product
from parley.train_step.fused_linear import BaseWeight, DenseWeight
from parley.train_step.kernels.precompile import kernel
from parley.train_step.nf4 import Nf4Weight

WARPS = 4
MOST_ROWS = 2  # from three on cuBLAS is quicker
LANE_BYTES = 16  # that one lane reads at once


@triton.jit
def _inverse_root(squares, K, eps, NORM: tl.constexpr):
    if NORM:
        return 1.0 / tl.sqrt(squares / K + eps)
    else:
        return squares * 0.0 + 1.0


@triton.jit
def _adapter_in(
    pid, x, x_stride, norm, a, u, ready, tuned, tuned_stride, eps, K, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u (B, P) = t A norm(x), BLOCK_N ranks a program; says so in `ready`."""
    p = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, B)[:, None]
    total, squares = dense(x, x_stride, norm, a, p, p < P, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
    next_may_come()
    total *= _inverse_root(squares, K, eps, NORM) * tl.load(tuned + b * tuned_stride, mask=b < ROWS, other=0.0)
    tl.store(u + b * P + p[None, :], total, mask=(b < ROWS) & (p[None, :] < P))
    tl.debug_barrier()
    tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _adapter_rows(sb, n, inside_n, P, BLOCK_P: tl.constexpr):
    """(1, N, P) = s B at the rows `n`."""
    p = tl.arange(0, BLOCK_P)[None, None, :]
    return tl.load(sb + n.to(tl.int64)[None, :, None] * P + p, mask=inside_n[None, :, None] & (p < P), other=0.0)


@triton.jit
def _adapter_out(rows, u, ready, makers, P, ROWS: tl.constexpr, B: tl.constexpr, BLOCK_P: tl.constexpr):
    """(B, N) = s B u, once u is complete."""
    while tl.atomic_add(ready, 0, sem="acquire") < makers:
        pass
    p = tl.arange(0, BLOCK_P)[None, None, :]
    b = tl.arange(0, B)[:, None, None]
    value = tl.load(u + b * P + p, mask=(b < ROWS) & (p < P), other=0.0, cache_modifier=".cg")
    return tl.sum(rows.to(tl.float32) * value, axis=2)


@triton.jit
def _place(tile, N0, N1, N2, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the piece that `tile` of a launch belongs to: the tile's number in it, its first column of y, its rows."""
    column, rows = 0, N0
    if PIECES == 3:
        tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
        if tile >= tiles0 + tiles1:
            tile, column, rows = tile - tiles0 - tiles1, N0 + N1, N2
        elif tile >= tiles0:
            tile, column, rows = tile - tiles0, N0, N1
    return tile, column, rows


@triton.jit
def _pieces(
    x, x_stride, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, n, inside_n, column, N0, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of the piece whose first column of y is `column`: a branch for each pointer, as one chosen at run time
    would lose its alignment."""
    if (PIECES == 1) or (column == 0):
        total, squares = any_weight(
            x, x_stride, norm, w0, absmax0, table, n, inside_n, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
        )
    elif column == N0:
        total, squares = any_weight(
            x, x_stride, norm, w1, absmax1, table, n, inside_n, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
        )
    else:
        total, squares = any_weight(
            x, x_stride, norm, w2, absmax2, table, n, inside_n, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
        )
    return total, squares


@kernel()
def _product(
    x, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, bias, a, sb, u, ready, tuned, out,
    x_stride, tuned_stride, out_stride, eps, K, N0, N1, N2, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, PIECES: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DENSE_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    makers = 0
    if BLOCK_P:
        makers = tl.cdiv(P, BLOCK_N)
    if pid < makers:
        _adapter_in(
            pid, x, x_stride, norm, a, u, ready, tuned, tuned_stride, eps, K, P, ROWS, B, NORM, BLOCK_N, DENSE_K
        )
    else:
        tile, column, rows = _place(pid - makers, N0, N1, N2, PIECES, BLOCK_N)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < rows
        n_out = n + column
        if BLOCK_P:
            adapter_rows = _adapter_rows(sb, n_out, inside_n, P, BLOCK_P)
        total, squares = _pieces(
            x, x_stride, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, n, inside_n, column, N0, K,
            ROWS, B, NORM, QUANT, PIECES, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        next_may_come()
        total *= _inverse_root(squares, K, eps, NORM)
        b = tl.arange(0, B)[:, None]
        mask = (b < ROWS) & inside_n[None, :]
        at = out + b * out_stride + n_out[None, :]
        if BIAS:
            total += tl.load(bias + n_out, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if BLOCK_P:
            total += _adapter_out(adapter_rows, u, ready, makers, P, ROWS, B, BLOCK_P)
        tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _two_packed(
    x, x_stride, norm, w0, w1, absmax0, absmax1, table, n, N, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products (B, N) of the rows `n` of two 4-bit weights, taken by turns in one tile, and the sums of squares."""
    turn = tl.arange(0, 2 * BLOCK_N)
    row, first = tl.min(n, axis=0) + turn // 2, (turn % 2 == 0)[None, :, None]
    words = tl.where(first, w0.to(tl.pointer_type(tl.int32)), w1.to(tl.pointer_type(tl.int32)))
    absmax = tl.where(first, absmax0, absmax1)
    both, squares = nf4(
        x, x_stride, norm, words, absmax, table, row, row < N, K, ROWS, B, NORM, QUANT, 2 * BLOCK_N, BLOCK_K
    )
    one, other = tl.split(tl.reshape(both, (B, BLOCK_N, 2)))
    return one, other, squares


@kernel()
def _gated(
    x, norm, w0, w1, absmax0, absmax1, table, a, sb, u, ready, tuned, out,
    x_stride, tuned_stride, out_stride, eps, K, N, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DENSE_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    makers = 0
    if BLOCK_P:
        makers = tl.cdiv(P, BLOCK_N)
    if pid < makers:
        _adapter_in(
            pid, x, x_stride, norm, a, u, ready, tuned, tuned_stride, eps, K, P, ROWS, B, NORM, BLOCK_N, DENSE_K
        )
    else:
        n = (pid - makers) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < N
        if BLOCK_P:
            gate_rows = _adapter_rows(sb, n, inside_n, P, BLOCK_P)
            up_rows = _adapter_rows(sb, n + N, inside_n, P, BLOCK_P)
        if QUANT:
            gate, up, squares = _two_packed(
                x, x_stride, norm, w0, w1, absmax0, absmax1, table, n, N, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
            )
        else:
            gate, squares = dense(x, x_stride, norm, w0, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
            up, _ = dense(x, x_stride, norm, w1, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
        next_may_come()
        inverse = _inverse_root(squares, K, eps, NORM)
        gate *= inverse
        up *= inverse
        if BLOCK_P:
            gate += _adapter_out(gate_rows, u, ready, makers, P, ROWS, B, BLOCK_P)
            up += _adapter_out(up_rows, u, ready, makers, P, ROWS, B, BLOCK_P)
        b = tl.arange(0, B)[:, None]
        act = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + b * out_stride + n[None, :], act.to(out.dtype.element_ty), mask=(b < ROWS) & inside_n[None, :])


@dataclass(frozen=True)
class RowWeight:
    """One projection's weight as the kernels read it. `quant`: values to a scale, 0 for a dense weight.

    `table`: the 16 values of a 4-bit weight in fp16, all low bytes before all high ones.
    """

    weight: Tensor
    absmax: Tensor
    table: Tensor
    quant: int
    rows: int

    @classmethod
    def of(cls, base: BaseWeight) -> RowWeight:
        if isinstance(base, Nf4Weight):
            absmax, code, quant = base.block_scales()
            table = code.half().view(torch.uint8).view(16, 2).t().contiguous()
            return cls(base.weight.data, absmax, table, quant, base.shape[0])
        assert isinstance(base, DenseWeight)
        weight = base.weight_NK
        assert weight.is_contiguous()
        return cls(weight, weight, weight, 0, weight.shape[0])


class RowProducts:
    """A Product's weights and adapter for the kernels of this file, by reference."""

    def __init__(self, product: Product) -> None:
        assert self.knows(product)
        linear = product.linear
        self.weights = [RowWeight.of(base) for base in self._bases(product)]
        self.bias_N = linear.bias_N
        self.a_PK, self.sb_NP = product.a_PK, product.sb_NP
        self.in_features = linear.in_features

    @staticmethod
    def knows(product: Product) -> bool:
        """Not projections of which only some are packed, packed rows of part of a word, nor a bias on gate and up."""
        bases, columns = product.linear.bases, product.linear.in_features
        alike = len({type(base) for base in bases}) == 1 and (isinstance(bases[0], DenseWeight) or columns % 8 == 0)
        return alike and (len(bases) != 2 or product.linear.bias_N is None)

    @staticmethod
    def _bases(product: Product) -> list[BaseWeight]:
        """Where there is a copy in 16 bits it is read: 4-bit weights take a quarter of the memory and more time."""
        if product.matrix_NK is None or not product.matrix_NK.is_contiguous():
            return product.linear.bases
        counts = [base.shape[0] for base in product.linear.bases]
        return [DenseWeight(weight_NK) for weight_NK in product.matrix_NK.split(counts)]

    @property
    def ranks(self) -> int:
        return 0 if self.a_PK is None else self.a_PK.shape[0]


@dataclass(frozen=True)
class Adapting:
    """What a launch needs for its adapter: room for u (fp32), a counter that is zero, and each row's share t."""

    u_BP: Tensor
    ready_1: Tensor
    tuned_B: Tensor


@dataclass(frozen=True)
class Norm:
    weight_D: Tensor
    eps: float


def _tile(weight: RowWeight, x_BK: Tensor) -> dict[str, int]:
    """Sizes of a program's tile: a lane reads 16 bytes of each of its rows at once, or 4 of 4-bit ones."""
    rows = x_BK.shape[0]
    values = 8 if weight.quant else LANE_BYTES // weight.weight.element_size()
    b = triton.next_power_of_2(rows)
    widest = triton.next_power_of_2(x_BK.shape[1])
    return {
        "ROWS": rows,
        "B": b,
        "QUANT": weight.quant,
        "BLOCK_N": {1: 2 if weight.quant else 8, 2: 4}.get(b, 2),
        "BLOCK_K": min(values * 32 * WARPS, widest),
        "DENSE_K": min(LANE_BYTES // x_BK.element_size() * 32 * WARPS, widest),
        "num_warps": WARPS,
    }


def _rank_block(ranks: int) -> int:
    return triton.next_power_of_2(ranks) if ranks else 0


def product(
    of: RowProducts, x_BK: Tensor, out_BN: Tensor, adapting: Adapting | None, norm: Norm | None = None, *, add: bool
) -> None:
    """Write y into `out_BN`, or `add` it there. `norm`: of x, before the product."""
    assert len(of.weights) in (1, 3)
    first, second, last = of.weights[0], of.weights[len(of.weights) // 2], of.weights[-1]
    counts = [weight.rows for weight in (first, second, last)]
    tile = _tile(first, x_BK)
    programs = sum(triton.cdiv(weight.rows, tile["BLOCK_N"]) for weight in of.weights)
    adapter, a, sb, ranks = _adapter(of, adapting, x_BK)
    _product[(programs + triton.cdiv(ranks, tile["BLOCK_N"]),)](
        x_BK, x_BK if norm is None else norm.weight_D,
        first.weight, second.weight, last.weight, first.absmax, second.absmax, last.absmax, first.table,
        x_BK if of.bias_N is None else of.bias_N, a, sb, adapter.u_BP, adapter.ready_1, adapter.tuned_B, out_BN,
        x_BK.stride(0), adapter.tuned_B.stride(0), out_BN.stride(0), 0.0 if norm is None else norm.eps,
        of.in_features, *counts, ranks,
        NORM=norm is not None, PIECES=len(of.weights), BIAS=of.bias_N is not None, ADD=add,
        BLOCK_P=_rank_block(ranks), **tile, **early(x_BK.device),
    )  # fmt: skip


def gated(of: RowProducts, x_BK: Tensor, out_BN: Tensor, adapting: Adapting | None, norm: Norm) -> None:
    """Write silu(g) u into `out_BN`, with g and u the two products of norm(x)."""
    gate, up = of.weights
    assert of.bias_N is None
    tile = _tile(gate, x_BK)
    adapter, a, sb, ranks = _adapter(of, adapting, x_BK)
    _gated[(triton.cdiv(gate.rows, tile["BLOCK_N"]) + triton.cdiv(ranks, tile["BLOCK_N"]),)](
        x_BK, norm.weight_D, gate.weight, up.weight, gate.absmax, up.absmax, gate.table,
        a, sb, adapter.u_BP, adapter.ready_1, adapter.tuned_B, out_BN,
        x_BK.stride(0), adapter.tuned_B.stride(0), out_BN.stride(0), norm.eps, of.in_features, gate.rows, ranks,
        NORM=True, BLOCK_P=_rank_block(ranks), **tile, **early(x_BK.device),
    )  # fmt: skip


def _adapter(of: RowProducts, adapting: Adapting | None, x_BK: Tensor) -> tuple[Adapting, Tensor, Tensor, int]:
    """What the kernels read of the adapter; where there is none, stand-ins that they do not."""
    if of.a_PK is None or of.sb_NP is None:
        nothing = torch.empty(0, device=x_BK.device) if adapting is None else adapting.u_BP
        return adapting or Adapting(nothing, nothing, nothing), x_BK, x_BK, 0
    assert adapting is not None
    return adapting, of.a_PK, of.sb_NP, of.ranks
