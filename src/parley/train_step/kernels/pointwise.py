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


@kernel()
def _qk_norm(
    x, out, q_weight, k_weight, x_stride, out_stride, eps, C, Q_RUNS: tl.constexpr, Q_RUN: tl.constexpr,
    K_RUNS: tl.constexpr, K_RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per run of elements that are normalised together; those behind the keys copy the values."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    x += row * x_stride
    out += row * out_stride
    if run >= Q_RUNS + K_RUNS:
        at = Q_RUNS * Q_RUN + K_RUNS * K_RUN + (run - Q_RUNS - K_RUNS) * BLOCK + d
        tl.store(out + at, tl.load(x + at, mask=at < C), mask=at < C)
        return
    # A run has the weight of queries or of keys: the other one's size is zero.
    q_size, k_size = tl.where(run < Q_RUNS, Q_RUN, 0), tl.where(run < Q_RUNS, 0, K_RUN)
    size = q_size + k_size
    at = tl.where(run < Q_RUNS, run * Q_RUN, Q_RUNS * Q_RUN + (run - Q_RUNS) * K_RUN) + d
    inside = d < size
    f = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=0) / size + eps)
    normed = (f * inverse).to(q_weight.dtype.element_ty).to(tl.float32)
    weight = tl.load(q_weight + d, mask=d < q_size, other=0.0).to(tl.float32)
    weight += tl.load(k_weight + d, mask=d < k_size, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * weight).to(out.dtype.element_ty), mask=inside)


@kernel()
def _qk_norm_backward(
    dx, x, q_weight, k_weight, dx_stride, x_stride, eps, Q_RUNS: tl.constexpr, Q_RUN: tl.constexpr,
    K_RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    # A run has the weight of queries or of keys: the other one's size is zero.
    q_size, k_size = tl.where(run < Q_RUNS, Q_RUN, 0), tl.where(run < Q_RUNS, 0, K_RUN)
    size = q_size + k_size
    at = tl.where(run < Q_RUNS, run * Q_RUN, Q_RUNS * Q_RUN + (run - Q_RUNS) * K_RUN) + d
    inside = d < size
    f = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dx + row * dx_stride + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(q_weight + d, mask=d < q_size, other=0.0).to(tl.float32)
    weight += tl.load(k_weight + d, mask=d < k_size, other=0.0).to(tl.float32)
    g *= weight
    inverse = 1.0 / tl.sqrt(tl.sum(f * f, axis=0) / size + eps)
    mean = tl.sum(f * g, axis=0) / size * inverse * inverse  # as in rms_norm.py
    tl.store(dx + row * dx_stride + at, ((g - f * mean) * inverse).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)  # exact at both ends: exp is 0 or infinite there


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """SiLU, or GELU by its tanh approximation (arXiv 1606.08415)."""
    if GELU:
        return 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _activation_derivative(gate, GELU: tl.constexpr):
    if GELU:
        t = _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
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
    rows, columns = x_TC.shape
    q_runs, k_runs, block = _runs(norms, shape)
    # In place the values are there already.
    values = 0 if out_TC.data_ptr() == x_TC.data_ptr() else triton.cdiv(shape.kv_heads * shape.head_dim, block)
    _qk_norm[(rows, q_runs + k_runs + values)](
        x_TC, out_TC, norms.q, norms.k, x_TC.stride(0), out_TC.stride(0), norms.eps, columns,
        Q_RUNS=q_runs, Q_RUN=len(norms.q), K_RUNS=k_runs, K_RUN=len(norms.k), BLOCK=block, **_warps(block),
    )  # fmt: skip


def qk_norm_backward(dx_TC: Tensor, x_TC: Tensor, norms: QkNorm, shape: AttentionShape) -> None:
    q_runs, k_runs, block = _runs(norms, shape)
    _qk_norm_backward[(x_TC.shape[0], q_runs + k_runs)](
        dx_TC, x_TC, norms.q, norms.k, dx_TC.stride(0), x_TC.stride(0), norms.eps,
        Q_RUNS=q_runs, Q_RUN=len(norms.q), K_RUN=len(norms.k), BLOCK=block, **_warps(block),
    )  # fmt: skip


def _runs(norms: QkNorm, shape: AttentionShape) -> tuple[int, int, int]:
    """Runs of elements that are normalised together in a row's queries and keys, and the block that holds one."""
    q_runs = shape.heads * shape.head_dim // len(norms.q)
    k_runs = shape.kv_heads * shape.head_dim // len(norms.k)
    return q_runs, k_runs, triton.next_power_of_2(max(len(norms.q), len(norms.k)))


def _warps(block: int) -> dict[str, int]:
    return {"num_warps": min(max(block // 256, 1), 8)}


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
