"""Attention of long documents through the libraries: cuDNN for each long one, PyTorch's flash kernels for the others.

On an H200 cuDNN takes 36 ms for forward and backward of 32,768 tokens (32 heads of 64), flash-attention 2 takes 53 and
the kernels of `attention.py` 58; with 2 x 4,096 tokens and heads of 128 the three take 2.2, 3.8 and 3.8. cuDNN builds
a plan for each new length, which takes the host milliseconds: so short documents, of many lengths, do not go there.

Shape suffixes (legend in docs/design.md): T tokens, D query columns, C query, key and value columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parley.library_compat.torch import (
    cudnn_attention,
    cudnn_attention_backward,
    varlen_flash_attention,
    varlen_flash_attention_backward,
)
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import LONG_DOCUMENT, DeviceBatch


def applies(x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape) -> bool:
    """Whether the host knows the documents and the longest is long. The libraries take 16-bit types and no soft cap."""
    long = batch.lengths is not None and max(batch.lengths) >= LONG_DOCUMENT
    return long and shape.softcap is None and x_TC.dtype in (torch.bfloat16, torch.float16)


def _runs(batch: DeviceBatch, shape: AttentionShape) -> Iterator[tuple[slice, Tensor | None, int]]:
    """Each long document as (its rows, None, its length); the short ones between them as (rows, boundaries, longest).

    cuDNN's operator has no window, so that with one even long documents go to the flash kernels; and its backward pass
    adds in no fixed order, so that they do with torch's deterministic algorithms, which the flash kernels follow.
    """
    assert batch.lengths is not None
    begin, short = 0, [0]
    by_cudnn = shape.window is None and not torch.are_deterministic_algorithms_enabled()
    for length in (*batch.lengths, None):  # None flushes the last run
        by_itself = length is not None and length >= LONG_DOCUMENT and by_cudnn
        if (by_itself or length is None) and len(short) > 1:
            # The library's kernels take cumulative lengths as int32 on the device.
            boundaries = torch.tensor(short, dtype=torch.int32).to(batch.ids_T.device, non_blocking=True)
            longest = max(b - a for a, b in itertools.pairwise(short))
            yield slice(begin, begin + short[-1]), boundaries, longest
            begin, short = begin + short[-1], [0]
        if length is not None and by_itself:
            yield slice(begin, begin + length), None, length
            begin += length
        elif length is not None:
            short.append(short[-1] + length)


def _zero_padding(out: Tensor, batch: DeviceBatch) -> None:
    """The libraries write documents alone, and NaN left in padding rows would spread to the adapters' gradients."""
    assert batch.lengths is not None
    out[sum(batch.lengths) :].zero_()


def attention(x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor) -> list[Any]:
    """Returns, for each run of `_runs`, the state that its backward operator reads."""
    qkv = shape.split_qkv(x_TC)
    saved: list[Any] = []
    _zero_padding(out_TD, batch)
    for run, boundaries, longest in _runs(batch, shape):
        q, k, v = (part[run] for part in qkv)
        if boundaries is None:
            # cuDNN takes a batch of (heads, tokens, head size).
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            out, state = cudnn_attention(q, k, v, shape.scale)
            out_TD[run] = out[0].transpose(0, 1).flatten(1)
            saved.append(state)
        else:
            out, lse = varlen_flash_attention(q, k, v, boundaries, longest, shape.scale, shape.window)
            out_TD[run] = out.flatten(1)
            saved.append(lse)
    return saved


def attention_backward(
    dout_TD: Tensor,
    x_TC: Tensor,
    out_TD: Tensor,
    saved: list[Any],
    batch: DeviceBatch,
    shape: AttentionShape,
    dx_TC: Tensor,
) -> None:
    out_THE, dout_THE = (x_TD.unflatten(1, (-1, shape.head_dim)) for x_TD in (out_TD, dout_TD))
    _zero_padding(dx_TC, batch)
    inputs = (dout_THE, *shape.split_qkv(x_TC), out_THE)
    for (run, boundaries, longest), state in zip(_runs(batch, shape), saved, strict=True):
        dout, q, k, v, out = (part[run] for part in inputs)
        if boundaries is None:
            dout, q, k, v, out = (part.transpose(0, 1)[None] for part in (dout, q, k, v, out))
            grads = cudnn_attention_backward(dout, q, k, v, out, state, shape.scale)
            grads = tuple(grad[0].transpose(0, 1) for grad in grads)
        else:
            grads = varlen_flash_attention_backward(
                dout, q, k, v, out, state, boundaries, longest, shape.scale, shape.window
            )
        for grad, part in zip(grads, shape.split_qkv(dx_TC), strict=True):
            part[run] = grad
