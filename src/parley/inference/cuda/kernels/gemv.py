"""Matrix-vector products for one or two rows, bound by reading the weights: one fused kernel each.

    gemv         y = W norm(x) + bias + t s B (A norm(x)), or h += the same    (up to three W side by side)
    gemv_swiglu  y = silu(g) u, with g and u each such a gemv

RMS norm: its weight is applied to x as x is loaded, and the inverse root, one number per row, to the sum afterwards.

LoRA and synchronisation: the first programs of the launch compute u = t A norm(x) and count up `ready` (release). The
others compute their rows of W first, then spin on `ready` (acquire) and add s B u. Programs are dispatched in the order
of their number and those that produce u never wait, so the spin ends.

Shape suffixes: B rows; N, K, P as in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.inference.cuda.kernels.dependent_launch import launch_dependents, pdl_options
from parley.inference.cuda.kernels.gemv_tiles import any_weight, dense, nf4
from parley.inference.linear import DecodeLinear
from parley.train_step.fused_linear import BaseWeight, DenseWeight
from parley.train_step.kernels.precompile import kernel
from parley.train_step.nf4 import Nf4Weight
from parley.train_step.ops import RmsNorm

WARPS = 4
MAX_GEMV_ROWS = 2  # cuBLAS is faster from three on
LANE_BYTES = 16  # the widest load of one lane


@triton.jit
def _inverse_root(squares, K, eps, NORM: tl.constexpr):
    if NORM:
        return 1.0 / tl.sqrt(squares / K + eps)
    else:
        return squares * 0.0 + 1.0


@triton.jit
def _lora_down(
    pid, x, x_stride, norm, a, u, ready, adapter_on, adapter_stride, eps, K, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """u (B, P) = t A norm(x), BLOCK_N ranks per program, which then counts itself in `ready`."""
    p = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, B)[:, None]
    total, squares = dense(x, x_stride, norm, a, p, p < P, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
    launch_dependents()
    total *= _inverse_root(squares, K, eps, NORM) * tl.load(adapter_on + b * adapter_stride, mask=b < ROWS, other=0.0)
    tl.store(u + b * P + p[None, :], total, mask=(b < ROWS) & (p[None, :] < P))
    tl.debug_barrier()  # all threads have stored their part of u before one of them releases it
    tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _load_sb(sb, n, inside_n, P, BLOCK_P: tl.constexpr):
    """(1, N, P): the rows `n` of s B, loaded before u is complete."""
    p = tl.arange(0, BLOCK_P)[None, None, :]
    return tl.load(sb + n.to(tl.int64)[None, :, None] * P + p, mask=inside_n[None, :, None] & (p < P), other=0.0)


@triton.jit
def _lora_up(rows, u, ready, producers, P, ROWS: tl.constexpr, B: tl.constexpr, BLOCK_P: tl.constexpr):
    """(B, N) = s B u, once u is complete."""
    while tl.atomic_add(ready, 0, sem="acquire") < producers:
        pass
    p = tl.arange(0, BLOCK_P)[None, None, :]
    b = tl.arange(0, B)[:, None, None]
    value = tl.load(u + b * P + p, mask=(b < ROWS) & (p < P), other=0.0, cache_modifier=".cg")
    return tl.sum(rows.to(tl.float32) * value, axis=2)


@triton.jit
def _locate_tile(tile, N0, N1, N2, PROJECTIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the projection that `tile` belongs to: the tile's number in it, its first column of y, and its rows."""
    column, rows = 0, N0
    if PROJECTIONS == 3:
        tiles0, tiles1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
        if tile >= tiles0 + tiles1:
            tile, column, rows = tile - tiles0 - tiles1, N0 + N1, N2
        elif tile >= tiles0:
            tile, column, rows = tile - tiles0, N0, N1
    return tile, column, rows


@triton.jit
def _weight_tile(
    x, x_stride, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, n, inside_n, column, N0, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, PROJECTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of the projection whose first column of y is `column`.

    One branch for each pointer: the compiler would not know the alignment of one that is selected at run time.
    """
    if (PROJECTIONS == 1) or (column == 0):
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
def _gemv(
    x, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, bias, a, sb, u, ready, adapter_on, out,
    x_stride, adapter_stride, out_stride, eps, K, N0, N1, N2, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, PROJECTIONS: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DENSE_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    producers = 0
    if BLOCK_P:
        producers = tl.cdiv(P, BLOCK_N)
    if pid < producers:
        _lora_down(
            pid, x, x_stride, norm, a, u, ready, adapter_on, adapter_stride, eps, K, P, ROWS, B, NORM, BLOCK_N, DENSE_K
        )
    else:
        tile, column, rows = _locate_tile(pid - producers, N0, N1, N2, PROJECTIONS, BLOCK_N)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < rows
        n_out = n + column
        if BLOCK_P:
            sb_rows = _load_sb(sb, n_out, inside_n, P, BLOCK_P)
        total, squares = _weight_tile(
            x, x_stride, norm, w0, w1, w2, absmax0, absmax1, absmax2, table, n, inside_n, column, N0, K,
            ROWS, B, NORM, QUANT, PROJECTIONS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        launch_dependents()
        total *= _inverse_root(squares, K, eps, NORM)
        b = tl.arange(0, B)[:, None]
        mask = (b < ROWS) & inside_n[None, :]
        target = out + b * out_stride + n_out[None, :]
        if BIAS:
            total += tl.load(bias + n_out, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if ADD:
            total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        if BLOCK_P:
            total += _lora_up(sb_rows, u, ready, producers, P, ROWS, B, BLOCK_P)
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _interleaved_nf4(
    x, x_stride, norm, w0, w1, absmax0, absmax1, table, n, N, K,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products (B, N) of the rows `n` of two 4-bit weights, interleaved in one tile, and the sums of squares."""
    i = tl.arange(0, 2 * BLOCK_N)
    row, first = tl.min(n, axis=0) + i // 2, (i % 2 == 0)[None, :, None]
    words = tl.where(first, w0.to(tl.pointer_type(tl.int32)), w1.to(tl.pointer_type(tl.int32)))
    absmax = tl.where(first, absmax0, absmax1)
    both, squares = nf4(
        x, x_stride, norm, words, absmax, table, row, row < N, K, ROWS, B, NORM, QUANT, 2 * BLOCK_N, BLOCK_K
    )
    gate, up = tl.split(tl.reshape(both, (B, BLOCK_N, 2)))
    return gate, up, squares


@kernel()
def _gemv_swiglu(
    x, norm, w0, w1, absmax0, absmax1, table, a, sb, u, ready, adapter_on, out,
    x_stride, adapter_stride, out_stride, eps, K, N, P,
    ROWS: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DENSE_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    producers = 0
    if BLOCK_P:
        producers = tl.cdiv(P, BLOCK_N)
    if pid < producers:
        _lora_down(
            pid, x, x_stride, norm, a, u, ready, adapter_on, adapter_stride, eps, K, P, ROWS, B, NORM, BLOCK_N, DENSE_K
        )
    else:
        n = (pid - producers) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < N
        if BLOCK_P:
            gate_rows = _load_sb(sb, n, inside_n, P, BLOCK_P)
            up_rows = _load_sb(sb, n + N, inside_n, P, BLOCK_P)
        if QUANT:
            gate, up, squares = _interleaved_nf4(
                x, x_stride, norm, w0, w1, absmax0, absmax1, table, n, N, K, ROWS, B, NORM, QUANT, BLOCK_N, BLOCK_K
            )
        else:
            gate, squares = dense(x, x_stride, norm, w0, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
            up, _ = dense(x, x_stride, norm, w1, n, inside_n, K, ROWS, B, NORM, BLOCK_N, BLOCK_K)
        launch_dependents()
        inverse = _inverse_root(squares, K, eps, NORM)
        gate *= inverse
        up *= inverse
        if BLOCK_P:
            gate += _lora_up(gate_rows, u, ready, producers, P, ROWS, B, BLOCK_P)
            up += _lora_up(up_rows, u, ready, producers, P, ROWS, B, BLOCK_P)
        b = tl.arange(0, B)[:, None]
        act = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + b * out_stride + n[None, :], act.to(out.dtype.element_ty), mask=(b < ROWS) & inside_n[None, :])


@dataclass(frozen=True)
class GemvWeight:
    """One projection's weight as the kernels read it. `quant`: values that share a scale, 0 for a dense weight.

    `table`: the 16 values of a 4-bit weight in fp16, all low bytes before all high ones.
    """

    weight: Tensor
    absmax: Tensor
    table: Tensor
    quant: int
    rows: int

    @classmethod
    def of(cls, base: BaseWeight) -> GemvWeight:
        if isinstance(base, Nf4Weight):
            absmax, code, quant = base.block_scales()
            table = code.half().view(torch.uint8).view(16, 2).t().contiguous()
            return cls(base.weight.data, absmax, table, quant, base.shape[0])
        assert isinstance(base, DenseWeight)
        weight = base.weight_NK
        assert weight.is_contiguous()
        return cls(weight, weight, weight, 0, weight.shape[0])

    def halves(self) -> list[GemvWeight]:
        """The first and the second half of the rows, as views."""
        parts = zip(self.weight.view(-1).chunk(2), self.absmax.view(-1).chunk(2), strict=True)
        return [replace(self, weight=weight, absmax=absmax, rows=self.rows // 2) for weight, absmax in parts]


class GemvLinear:
    """A DecodeLinear's weights and adapter for the kernels of this file, by reference."""

    def __init__(self, decode_linear: DecodeLinear) -> None:
        assert self.supports(decode_linear)
        linear = decode_linear.linear
        self.weights = [GemvWeight.of(base) for base in self._bases(decode_linear)]
        self.bias_N = linear.bias_N
        self.a_PK, self.sb_NP = decode_linear.a_PK, decode_linear.sb_NP
        self.in_features = linear.in_features

    @classmethod
    def of_gate_up(cls, decode_linear: DecodeLinear) -> GemvLinear:
        """Gate and up as two weights, also where the model has one matrix of both."""
        linear = cls(decode_linear)
        if len(linear.weights) == 1:
            linear.weights = linear.weights[0].halves()
        return linear

    @staticmethod
    def supports(decode_linear: DecodeLinear) -> bool:
        """False where only some projections are 4-bit, or 4-bit rows end within a word."""
        bases, columns = decode_linear.linear.bases, decode_linear.linear.in_features
        return len({type(base) for base in bases}) == 1 and (isinstance(bases[0], DenseWeight) or columns % 8 == 0)

    @classmethod
    def supports_gate_up(cls, decode_linear: DecodeLinear) -> bool:
        """False also where there is a bias, or where the halves of one 4-bit matrix share the scale of a block."""
        bases = decode_linear.linear.bases
        if not cls.supports(decode_linear) or decode_linear.linear.bias_N is not None:
            return False
        if len(bases) == 1 and isinstance(bases[0], Nf4Weight):
            rows, columns = bases[0].shape
            return rows // 2 * columns % bases[0].weight.quant_state.blocksize == 0
        return True

    @staticmethod
    def _bases(decode_linear: DecodeLinear) -> list[BaseWeight]:
        """The fused 16-bit copy where there is one: 4-bit weights take a quarter of the memory and more time."""
        if decode_linear.weight_NK is None or not decode_linear.weight_NK.is_contiguous():
            return decode_linear.linear.bases
        counts = [base.shape[0] for base in decode_linear.linear.bases]
        return [DenseWeight(weight_NK) for weight_NK in decode_linear.weight_NK.split(counts)]

    @property
    def ranks(self) -> int:
        return 0 if self.a_PK is None else self.a_PK.shape[0]


@dataclass(frozen=True)
class LoraScratch:
    """What a launch needs for LoRA: a buffer for u (fp32), a counter that is zero, and each row's t."""

    u_BP: Tensor
    ready_1: Tensor
    adapter_B: Tensor


def _tile(weight: GemvWeight, x_BK: Tensor) -> dict[str, int]:
    """The tile of a program: a lane loads 16 bytes of each of its rows at once, or 4 bytes of 4-bit weights."""
    rows = x_BK.shape[0]
    values = 8 if weight.quant else LANE_BYTES // weight.weight.element_size()
    b = triton.next_power_of_2(rows)
    max_block = triton.next_power_of_2(x_BK.shape[1])
    return {
        "ROWS": rows,
        "B": b,
        "QUANT": weight.quant,
        "BLOCK_N": {1: 2 if weight.quant else 8, 2: 4}.get(b, 2),
        "BLOCK_K": min(values * 32 * WARPS, max_block),
        "DENSE_K": min(LANE_BYTES // x_BK.element_size() * 32 * WARPS, max_block),
        "num_warps": WARPS,
    }


def _rank_block(ranks: int) -> int:
    return triton.next_power_of_2(ranks) if ranks else 0


def gemv(
    linear: GemvLinear,
    x_BK: Tensor,
    out_BN: Tensor,
    lora: LoraScratch | None,
    norm: RmsNorm | None = None,
    *,
    add: bool,
) -> None:
    """Write y into `out_BN`, or `add` it there. `norm`: applied to x first."""
    assert len(linear.weights) in (1, 3)
    first, second, last = linear.weights[0], linear.weights[len(linear.weights) // 2], linear.weights[-1]
    rows = [weight.rows for weight in (first, second, last)]
    tile = _tile(first, x_BK)
    programs = sum(triton.cdiv(weight.rows, tile["BLOCK_N"]) for weight in linear.weights)
    adapter, a, sb, ranks = _adapter(linear, lora, x_BK)
    _gemv[(programs + triton.cdiv(ranks, tile["BLOCK_N"]),)](
        x_BK, x_BK if norm is None else norm.weight_D,
        first.weight, second.weight, last.weight, first.absmax, second.absmax, last.absmax, first.table,
        x_BK if linear.bias_N is None else linear.bias_N,
        a, sb, adapter.u_BP, adapter.ready_1, adapter.adapter_B, out_BN,
        x_BK.stride(0), adapter.adapter_B.stride(0), out_BN.stride(0), 0.0 if norm is None else norm.eps,
        linear.in_features, *rows, ranks,
        NORM=norm is not None, PROJECTIONS=len(linear.weights), BIAS=linear.bias_N is not None, ADD=add,
        BLOCK_P=_rank_block(ranks), **tile, **pdl_options(x_BK.device),
    )  # fmt: skip


def gemv_swiglu(linear: GemvLinear, x_BK: Tensor, out_BN: Tensor, lora: LoraScratch | None, norm: RmsNorm) -> None:
    """Write silu(g) u into `out_BN`, with g and u the two products of norm(x)."""
    gate, up = linear.weights
    assert linear.bias_N is None
    tile = _tile(gate, x_BK)
    adapter, a, sb, ranks = _adapter(linear, lora, x_BK)
    _gemv_swiglu[(triton.cdiv(gate.rows, tile["BLOCK_N"]) + triton.cdiv(ranks, tile["BLOCK_N"]),)](
        x_BK, norm.weight_D, gate.weight, up.weight, gate.absmax, up.absmax, gate.table,
        a, sb, adapter.u_BP, adapter.ready_1, adapter.adapter_B, out_BN,
        x_BK.stride(0), adapter.adapter_B.stride(0), out_BN.stride(0), norm.eps, linear.in_features, gate.rows, ranks,
        NORM=True, BLOCK_P=_rank_block(ranks), **tile, **pdl_options(x_BK.device),
    )  # fmt: skip


def _adapter(linear: GemvLinear, lora: LoraScratch | None, x_BK: Tensor) -> tuple[LoraScratch, Tensor, Tensor, int]:
    """The LoRA arguments of a launch; without an adapter, placeholders that the kernel does not read."""
    if linear.a_PK is None or linear.sb_NP is None:
        nothing = torch.empty(0, device=x_BK.device) if lora is None else lora.u_BP
        return lora or LoraScratch(nothing, nothing, nothing), x_BK, x_BK, 0
    assert lora is not None
    return lora, linear.a_PK, linear.sb_NP, linear.ranks
