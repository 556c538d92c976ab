"""The adapters' small work: their weights into the fused matrices, and their gradients.

Shape suffixes: T tokens, M and N rows and columns of a matrix, K columns in, P lora_columns columns, R rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.split_reduction import FULL_OCCUPANCY, is_last_to_arrive
from parley.train_step.ops import AdapterSlice, ScaledCopy

COPY_BLOCK = 4096


@kernel()
def _copy_scaled(source, out, source_stride, out_stride, scale, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < M) & (n < N)
    value = tl.load(source + m * source_stride + n, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + m * out_stride + n, value.to(out.dtype.element_ty), mask=inside)


@kernel()
def _run_copies(table, scales, tiles, first_source, first_out, BLOCK: tl.constexpr):
    """One tile of one copy. `tiles` has its copy and first element, `table` the addresses of all copies.

    The pointers come as integers; `first_source` and `first_out` give them their types.
    """
    which = tl.load(tiles + 2 * tl.program_id(0))
    begin = tl.load(tiles + 2 * tl.program_id(0) + 1)
    entry = table + 5 * which
    source = tl.load(entry).to(first_source.dtype)
    out = tl.load(entry + 1).to(first_out.dtype)
    out_stride = tl.load(entry + 2)
    columns = tl.load(entry + 3).to(tl.int32)
    size = tl.load(entry + 4)
    i = begin + tl.arange(0, BLOCK)
    value = tl.load(source + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(scales + which)
    at = (i // columns).to(tl.int64) * out_stride + i % columns
    tl.store(out + at, value.to(first_out.dtype.element_ty), mask=i < size)


@triton.jit
def _accumulate(
    wide, thin, out, partials, arrivals, wide_stride, thin_stride, out_wide_stride, out_thin_stride, scale, begin,
    T, M, R, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[m, r] += scale * sum over t of wide[t, m] thin[t, r], for BLOCK_M columns m from `begin` on and all r.

    With SPLITS > 1 the tokens t are shared by as many programs (split_reduction.py).
    """
    i = tl.arange(0, BLOCK_M)
    m = begin + i
    r = tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    rows = tl.cdiv(tl.cdiv(T, SPLITS), BLOCK_T) * BLOCK_T
    until = tl.minimum((split + 1) * rows, T)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(split * rows, until, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        p = tl.load(wide + t * wide_stride + m[None, :], mask=(t < until) & (m[None, :] < M), other=0.0)
        q = tl.load(thin + t * thin_stride + r[None, :], mask=(t < until) & (r[None, :] < R), other=0.0)
        total = tl.dot(tl.trans(p), q, total, input_precision="ieee")
    inside = (m[:, None] < M) & (r[None, :] < R)
    last = True
    if SPLITS > 1:
        at = partials + r[None, :] * BLOCK_M + i[:, None]
        tl.store(at + split * BLOCK_M * BLOCK_R, total, mask=inside)
        last = is_last_to_arrive(arrivals, SPLITS)
        if last:
            total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(at + other * BLOCK_M * BLOCK_R, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        at = out + m[:, None] * out_wide_stride + r[None, :] * out_thin_stride
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total * scale, mask=inside)


@kernel()
def _group_gradients(
    dy, x, da, db, partials, arrivals, dy_stride, x_stride, scale, T, N, K, A_PROGRAMS, first_end, second_end,
    R: tl.constexpr, ALL_RANKS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ALL: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """da (ALL_RANKS, K) += v^T x in the first programs; db (N, R) += scale dy^T u, u by projection, in the others."""
    program = tl.program_id(0)
    partials += program * (SPLITS * BLOCK * BLOCK_ALL)
    arrivals += program
    if program < A_PROGRAMS:
        _accumulate(
            x, dy + N, da, partials, arrivals, x_stride, dy_stride, 1, K, 1.0, program * BLOCK, T, K, ALL_RANKS,
            BLOCK, BLOCK_ALL, BLOCK_T, SPLITS,
        )  # fmt: skip
    else:
        begin = (program - A_PROGRAMS) * BLOCK
        projection = (begin >= first_end).to(tl.int32) + (begin >= second_end).to(tl.int32)
        _accumulate(
            dy, x + K + projection * R, db, partials, arrivals, dy_stride, x_stride, R, 1, scale, begin, T, N, R,
            BLOCK, BLOCK_R, BLOCK_T, SPLITS,
        )  # fmt: skip


@kernel()
def _single_gradient(
    wide, thin, out, wide_stride, thin_stride, out_wide_stride, out_thin_stride, scale, T, M, R,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * BLOCK_M
    _accumulate(
        wide, thin, out, out, out, wide_stride, thin_stride, out_wide_stride, out_thin_stride, scale, begin, T, M, R,
        BLOCK_M, BLOCK_R, BLOCK_T, 1,
    )  # fmt: skip


def copy_scaled(source: Tensor, out: Tensor, scale: float) -> None:
    rows, columns = source.shape
    block_n = min(triton.next_power_of_2(columns), 1024)
    block_m = max(2048 // block_n, 1)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    _copy_scaled[grid](
        source, out, source.stride(0), out.stride(0), scale, rows, columns, BLOCK_M=block_m, BLOCK_N=block_n
    )


@dataclass(frozen=True)
class PreparedCopies:
    """Many copies as one launch. The tables hold addresses: the tensors must not move as long as they are used."""

    copies: list[ScaledCopy]
    table_C5: Tensor  # addresses of source and out, out's stride, columns, elements
    scale_C: Tensor
    tile_2: Tensor  # (tiles, 2): which copy, and the first element of it


def prepare_copies(copies: list[ScaledCopy]) -> PreparedCopies:
    entries, tiles = [], []
    for index, (source, out, _) in enumerate(copies):
        assert source.is_contiguous()
        assert out.stride(1) == 1
        assert source.shape == out.shape
        assert (source.dtype, out.dtype) == (copies[0][0].dtype, copies[0][1].dtype)
        entries.append((source.data_ptr(), out.data_ptr(), out.stride(0), source.shape[1], source.numel()))
        tiles += [(index, begin) for begin in range(0, source.numel(), COPY_BLOCK)]
    device = copies[0][0].device
    return PreparedCopies(
        copies,
        torch.tensor(entries, dtype=torch.int64, device=device),
        torch.tensor([scale for _, _, scale in copies], dtype=torch.float32, device=device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
    )


def run_copies(prepared: PreparedCopies) -> None:
    source, out, _ = prepared.copies[0]
    _run_copies[(len(prepared.tile_2),)](
        prepared.table_C5, prepared.scale_C, prepared.tile_2, source, out, BLOCK=COPY_BLOCK, num_warps=8
    )


BLOCK = 64  # columns of a program; on an H200 four stages of 64 rows were faster than any wider or longer tile
MIN_SPLIT_TOKENS = 1024  # fewer are not worth a partial sum


def _adjacent(parts: list[Tensor]) -> bool:
    """Whether `parts` follow each other in memory without a gap."""
    return all(a.data_ptr() + a.numel() * a.element_size() == b.data_ptr() for a, b in itertools.pairwise(parts))


def _fits_one_launch(adapter_slices: list[AdapterSlice], out_features: int) -> bool:
    """Whether one launch serves all: every projection adapted, with one rank and scale, adjacent in memory."""
    adapters = [item.adapter for item in adapter_slices]
    return (
        len(adapter_slices) <= 3
        and sum(item.rows.stop - item.rows.start for item in adapter_slices) == out_features
        and len({(a.a_RK.shape[0], a.scale) for a in adapters}) == 1
        and adapter_slices[-1].columns.stop <= 128
        and all(item.rows.start % BLOCK == 0 for item in adapter_slices)
        and _adjacent([a.da_RK for a in adapters])
        and _adjacent([a.db_NR for a in adapters])
    )


def add_adapter_gradients(
    dy_TNP: Tensor, x_TKP: Tensor, adapter_slices: list[AdapterSlice], out_features: int, in_features: int
) -> None:
    if not _fits_one_launch(adapter_slices, out_features):
        v_TP, u_TP = dy_TNP[:, out_features:], x_TKP[:, in_features:]
        for item in adapter_slices:
            adapter = item.adapter
            _launch_single(x_TKP[:, :in_features], v_TP[:, item.columns], adapter.da_RK.t(), 1.0)
            _launch_single(dy_TNP[:, item.rows], u_TP[:, item.columns], adapter.db_NR, adapter.scale)
        return
    first = adapter_slices[0].adapter
    rank, lora_columns = first.a_RK.shape[0], adapter_slices[-1].columns.stop
    ends = [item.rows.stop for item in adapter_slices] + [out_features] * 2
    block_all = max(16, triton.next_power_of_2(lora_columns))
    a_programs = triton.cdiv(in_features, BLOCK)
    programs = a_programs + triton.cdiv(out_features, BLOCK)
    splits = _splits(dy_TNP.shape[0], programs)
    partials, arrivals = first.da_RK, first.da_RK  # placeholders: neither is read without splits
    if splits > 1:
        partials = first.da_RK.new_empty(programs * splits * BLOCK * block_all)
        arrivals = torch.zeros(programs, dtype=torch.int32, device=partials.device)
    _group_gradients[(programs, splits)](
        dy_TNP, x_TKP, first.da_RK, first.db_NR, partials, arrivals, dy_TNP.stride(0), x_TKP.stride(0), first.scale,
        dy_TNP.shape[0], out_features, in_features, a_programs, ends[0], ends[1],
        R=rank, ALL_RANKS=lora_columns, BLOCK=BLOCK, BLOCK_ALL=block_all, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_T=64, SPLITS=splits, num_stages=4,
    )  # fmt: skip


def _splits(tokens: int, programs: int) -> int:
    """How many programs share the tokens of a tile: a power of two, since each number is compiled by itself."""
    splits = max(min(FULL_OCCUPANCY // programs, tokens // MIN_SPLIT_TOKENS), 1)
    return 1 << (splits.bit_length() - 1)


def _launch_single(wide_TM: Tensor, thin_TR: Tensor, out_MR: Tensor, scale: float) -> None:
    (tokens, wide), thin = wide_TM.shape, thin_TR.shape[1]
    _single_gradient[(triton.cdiv(wide, 64),)](
        wide_TM, thin_TR, out_MR, wide_TM.stride(0), thin_TR.stride(0), *out_MR.stride(), scale, tokens, wide, thin,
        BLOCK_M=64, BLOCK_R=max(16, triton.next_power_of_2(thin)), BLOCK_T=32 if thin > 64 else 128,
    )  # fmt: skip
