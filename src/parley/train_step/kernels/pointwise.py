"""Rotary embeddings in place, norms of query and key heads, and gated activations, forward and backward.

One program per row (and run of columns).

Rotary layout (transformers): the halves of a head are a pair, (a, b) -> (a cos - b sin, b cos + a sin). The backward
pass is the rotation by the negative angle. Elements of a head behind the rotated ones stay as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel
from parley.train_step.kernels.tanh import tanh
from parley.train_step.ops import AttentionShape, QkNorm, RopeTable
from parley.train_step.packed_batch import DeviceBatch


@kernel()
def _rope(
    x, cos, sin, position, x_stride, sign, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (h < HEADS) & (e < HALF)
    at = tl.load(position + row)
    c = tl.load(cos + at * HALF + e, mask=e < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + at * HALF + e, mask=e < HALF, other=0.0).to(tl.float32) * sign
    first = x + row * x_stride + h * HEAD_DIM + e
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * c - b * s).to(x.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _load_runs(x, weight, run, d, RUNS: tl.constexpr, RUN: tl.constexpr):
    """RUNS runs of RUN elements that are normalised together, (runs, RUN) in fp32; where they lie, and the weight."""
    at = run * RUN + d
    inside = (run < RUNS) & (d < RUN)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return value, at, inside, tl.load(weight + d, mask=d < RUN, other=0.0).to(tl.float32)


@triton.jit
def _normalise_runs(
    x, out, weight, eps, RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK: tl.constexpr
):
    run, d = tl.arange(0, BLOCK_RUNS)[:, None], tl.arange(0, BLOCK)[None, :]
    f, at, inside, w = _load_runs(x, weight, run, d, RUNS, RUN)
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=1) / RUN + eps)[:, None]
    normed = (f * inverse).to(weight.dtype.element_ty).to(tl.float32)  # as in rms_norm.py
    tl.store(out + at, (normed * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normalise_runs_backward(
    dx, x, weight, eps, RUNS: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK: tl.constexpr
):
    run, d = tl.arange(0, BLOCK_RUNS)[:, None], tl.arange(0, BLOCK)[None, :]
    f, at, inside, w = _load_runs(x, weight, run, d, RUNS, RUN)
    g = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32) * w
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=1) / RUN + eps)[:, None]
    mean = (tl.sum(f * g, axis=1) / RUN)[:, None] * inverse * inverse
    tl.store(dx + at, ((g - f * mean) * inverse).to(dx.dtype.element_ty), mask=inside)


@kernel()
def _qk_norm(
    x, out, q_weight, k_weight, x_stride, out_stride, eps, C, Q_RUNS: tl.constexpr, Q_RUN: tl.constexpr,
    K_RUNS: tl.constexpr, K_RUN: tl.constexpr, Q_BLOCK_RUNS: tl.constexpr, K_BLOCK_RUNS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One program per row. VALUES: a power of two that holds the values, which are copied; 0 leaves them."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    _normalise_runs(x, out, q_weight, eps, Q_RUNS, Q_RUN, Q_BLOCK_RUNS, Q_BLOCK)
    keys: tl.constexpr = Q_RUNS * Q_RUN
    _normalise_runs(x + keys, out + keys, k_weight, eps, K_RUNS, K_RUN, K_BLOCK_RUNS, K_BLOCK)
    if VALUES > 0:
        at = keys + K_RUNS * K_RUN + tl.arange(0, VALUES)
        tl.store(out + at, tl.load(x + at, mask=at < C), mask=at < C)


@kernel()
def _qk_norm_backward(
    dx, x, q_weight, k_weight, dx_stride, x_stride, eps, Q_RUNS: tl.constexpr, Q_RUN: tl.constexpr,
    K_RUNS: tl.constexpr, K_RUN: tl.constexpr, Q_BLOCK_RUNS: tl.constexpr, K_BLOCK_RUNS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    dx += row * dx_stride
    _normalise_runs_backward(dx, x, q_weight, eps, Q_RUNS, Q_RUN, Q_BLOCK_RUNS, Q_BLOCK)
    keys: tl.constexpr = Q_RUNS * Q_RUN
    _normalise_runs_backward(dx + keys, x + keys, k_weight, eps, K_RUNS, K_RUN, K_BLOCK_RUNS, K_BLOCK)


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """SiLU, or GELU by its tanh approximation (arXiv 1606.08415)."""
    if GELU:
        return 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _activation_derivative(gate, GELU: tl.constexpr):
    if GELU:
        t = tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        return 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * inner
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return sigmoid * (1.0 + gate * (1.0 - sigmoid))


@kernel()
def _glu(x, out, x_stride, out_stride, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + F + f, mask=inside, other=0.0)
    # Rounded to the activations' type before the product, as transformers does.
    activated = _activation(gate, GELU).to(up.dtype).to(tl.float32)
    tl.store(out + row * out_stride + f, (activated * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@kernel()
def _glu_backward(dout, x, dx, dout_stride, x_stride, dx_stride, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    d = tl.load(dout + row * dout_stride + f, mask=inside, other=0.0).to(tl.float32)
    # x and dx may be the same memory: both loads come before the stores.
    gate = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + F + f, mask=inside, other=0.0).to(tl.float32)
    dgate, dup = d * up * _activation_derivative(gate, GELU), d * _activation(gate, GELU)
    tl.store(dx + row * dx_stride + f, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + row * dx_stride + F + f, dup.to(dx.dtype.element_ty), mask=inside)


def rope(x_TC: Tensor, batch: DeviceBatch, rope: RopeTable, shape: AttentionShape, *, inverse: bool = False) -> None:
    heads, half = shape.heads + shape.kv_heads, rope.cos_LE.shape[1]
    _rope[(x_TC.shape[0],)](
        x_TC,
        rope.cos_LE,
        rope.sin_LE,
        batch.position_T,
        x_TC.stride(0),
        -1.0 if inverse else 1.0,
        HEADS=heads,
        HEAD_DIM=shape.head_dim,
        HALF=half,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_E=triton.next_power_of_2(half),
    )


def qk_norm(x_TC: Tensor, norms: QkNorm, shape: AttentionShape, out_TC: Tensor) -> None:
    in_place = out_TC.data_ptr() == x_TC.data_ptr()  # the values are there already
    values = 0 if in_place else triton.next_power_of_2(shape.kv_heads * shape.head_dim)
    _qk_norm[(x_TC.shape[0],)](
        x_TC, out_TC, norms.q, norms.k, x_TC.stride(0), out_TC.stride(0), norms.eps, x_TC.shape[1],
        **_runs(norms, shape), VALUES=values, num_warps=4,
    )  # fmt: skip


def qk_norm_backward(dx_TC: Tensor, x_TC: Tensor, norms: QkNorm, shape: AttentionShape) -> None:
    _qk_norm_backward[(x_TC.shape[0],)](
        dx_TC, x_TC, norms.q, norms.k, dx_TC.stride(0), x_TC.stride(0), norms.eps, **_runs(norms, shape), num_warps=4
    )


def _runs(norms: QkNorm, shape: AttentionShape) -> dict[str, int]:
    """Runs of elements that are normalised together, their length, and the powers of two that hold both."""
    sizes = {}
    for name, weight, heads in (("Q", norms.q, shape.heads), ("K", norms.k, shape.kv_heads)):
        runs = heads * shape.head_dim // len(weight)
        sizes[f"{name}_RUNS"], sizes[f"{name}_RUN"] = runs, len(weight)
        sizes[f"{name}_BLOCK_RUNS"] = triton.next_power_of_2(runs)
        sizes[f"{name}_BLOCK"] = triton.next_power_of_2(len(weight))
    return sizes


def glu(x_T2F: Tensor, out_TF: Tensor, activation: str) -> None:
    rows, columns = out_TF.shape
    grid = (rows, triton.cdiv(columns, 1024))
    strides = (x_T2F.stride(0), out_TF.stride(0))
    _glu[grid](x_T2F, out_TF, *strides, columns, GELU=activation != "silu", BLOCK=1024)


def glu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor, activation: str) -> None:
    rows, columns = dout_TF.shape
    grid = (rows, triton.cdiv(columns, 1024))
    strides = (dout_TF.stride(0), x_T2F.stride(0), dx_T2F.stride(0))
    _glu_backward[grid](dout_TF, x_T2F, dx_T2F, *strides, columns, GELU=activation != "silu", BLOCK=1024)
