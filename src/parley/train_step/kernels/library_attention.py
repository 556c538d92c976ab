"""Attention for long documents through the libraries: cuDNN for each long one, PyTorch's flash kernels for the others.

On an H200 cuDNN takes 36 ms for the two directions of 32,768 tokens (32 heads of 64), flash-attention 2 takes 53 and
the kernels of `attention.py` 58; with 2 x 4,096 tokens and heads of 128 the three take 2.2, 3.8 and 3.8. It plans anew
for each length it has not met.

Shape suffixes: T tokens, D query columns, C query, key and value columns side by side, L tokens of one document,
H heads, K key-value heads, E head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import LONG, Rows

aten = torch.ops.aten


def takes(x_TC: Tensor, rows: Rows) -> bool:
    """Whether the documents are known on the host and the longest is long; the libraries know 16-bit types alone."""
    long = rows.lengths is not None and max(rows.lengths) >= LONG
    return long and x_TC.dtype in (torch.bfloat16, torch.float16)


def _runs(rows: Rows, shape: AttentionShape) -> Iterator[tuple[slice, Tensor | None, int]]:
    """Each long document as (its rows, None, its length); documents between them as (rows, borders, longest)."""
    assert rows.lengths is not None
    begin, short = 0, [0]
    for length in (*rows.lengths, None):
        alone = length is not None and length >= LONG and shape.window is None
        if (alone or length is None) and len(short) > 1:
            borders = torch.tensor(short, dtype=torch.int32).to(rows.ids_T.device, non_blocking=True)
            longest = max(b - a for a, b in itertools.pairwise(short))
            yield slice(begin, begin + short[-1]), borders, longest
            begin, short = begin + short[-1], [0]
        if length is not None and alone:
            yield slice(begin, begin + length), None, length
            begin += length
        elif length is not None:
            short.append(short[-1] + length)


def attention(x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> list[Any]:
    """Returns, for each run of `_runs`, what its kernel wants back."""
    parts = shape.parts(x_TC)
    saved = []
    for run, borders, longest in _runs(rows, shape):
        q, k, v = (part[run] for part in parts)
        if borders is None:
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            out, *more, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=shape.scale)
            out_TD[run] = out[0].transpose(0, 1).flatten(1)
            saved.append(more)
        else:
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=shape.scale, **_window(shape)
            )
            out_TD[run] = out.flatten(1)
            saved.append(lse)
    return saved


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: list[Any], rows: Rows, shape: AttentionShape, dx_TC: Tensor
) -> None:
    parts = (*shape.parts(x_TC), *(x.unflatten(1, (-1, shape.size)) for x in (out_TD, dout_TD)))
    for (run, borders, longest), more in zip(_runs(rows, shape), saved, strict=True):
        q, k, v, out, dout = (part[run] for part in parts)
        if borders is None:
            q, k, v, out, dout = (part.transpose(0, 1)[None] for part in (q, k, v, out, dout))
            lse, first_q, first_k, max_q, max_k, seed, offset = more
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                dout, q, k, v, out, lse, seed, offset, None, first_q, first_k, max_q, max_k, 0.0, True,
                scale=shape.scale,
            )  # fmt: skip
            grads = tuple(grad[0].transpose(0, 1) for grad in grads)
        else:
            seed = torch.zeros(2, dtype=torch.uint64, device=x_TC.device)  # there is no dropout to repeat
            grads = aten._flash_attention_backward(
                dout, q, k, v, out, more, borders, borders, longest, longest, 0.0, True, seed, seed[:0],
                scale=shape.scale, **_window(shape),
            )  # fmt: skip
        for grad, part in zip(grads, shape.parts(dx_TC), strict=True):
            part[run] = grad


def _window(shape: AttentionShape) -> dict[str, int]:
    return {} if shape.window is None else {"window_size_left": shape.window - 1, "window_size_right": 0}
