"""Rotary embeddings in place and SwiGLU, forward and backward. One program per row (and run of columns).

Rotary layout (transformers): the halves of a head are a pair, (a, b) -> (a cos - b sin, b cos + a sin). The backward
pass is the rotation by the negative angle.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from parley.train_step.kernels.precompile import kernel
from parley.train_step.ops import AttentionShape, RopeTable
from parley.train_step.packed_batch import DeviceBatch


@kernel()
def _rope(
    x, cos, sin, position, x_stride, sign, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (h < HEADS) & (e < HALF)
    at = tl.load(position + row)
    c = tl.load(cos + at * HALF + e, mask=e < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + at * HALF + e, mask=e < HALF, other=0.0).to(tl.float32) * sign
    first = x + row * x_stride + h * (2 * HALF) + e
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * c - b * s).to(x.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=inside)


@kernel()
def _swiglu(x, out, x_stride, out_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    gate = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + F + f, mask=inside, other=0.0)
    # Rounded to the activations' type before the product, as transformers does.
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * out_stride + f, (silu * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


@kernel()
def _swiglu_backward(dout, x, dx, dout_stride, x_stride, dx_stride, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    d = tl.load(dout + row * dout_stride + f, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + F + f, mask=inside, other=0.0).to(tl.float32)
    # d silu(z) / dz = sigmoid(z) (1 + z (1 - sigmoid(z))). x and dx may be the same memory: both loads come first.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx + row * dx_stride + f, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + row * dx_stride + F + f, (d * gate * sigmoid).to(dx.dtype.element_ty), mask=inside)


def rope(x_TC: Tensor, batch: DeviceBatch, rope: RopeTable, shape: AttentionShape, *, inverse: bool = False) -> None:
    heads, half = shape.heads + shape.kv_heads, shape.head_dim // 2
    _rope[(x_TC.shape[0],)](
        x_TC,
        rope.cos_LE,
        rope.sin_LE,
        batch.position_T,
        x_TC.stride(0),
        -1.0 if inverse else 1.0,
        HEADS=heads,
        HALF=half,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_E=triton.next_power_of_2(half),
    )


def swiglu(x_T2F: Tensor, out_TF: Tensor) -> None:
    rows, columns = out_TF.shape
    grid = (rows, triton.cdiv(columns, 1024))
    _swiglu[grid](x_T2F, out_TF, x_T2F.stride(0), out_TF.stride(0), columns, BLOCK=1024)


def swiglu_backward(dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor) -> None:
    rows, columns = dout_TF.shape
    grid = (rows, triton.cdiv(columns, 1024))
    strides = (dout_TF.stride(0), x_T2F.stride(0), dx_T2F.stride(0))
    _swiglu_backward[grid](dout_TF, x_T2F, dx_T2F, *strides, columns, BLOCK=1024)
