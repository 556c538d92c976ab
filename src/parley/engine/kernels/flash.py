"""Attention for long documents, through PyTorch's own kernels, a document at a time.

Shape suffixes: T tokens, D query columns, C query, key and value columns side by side, L tokens of one document,
H heads, K key-value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parley.engine.documents import Rows
from parley.engine.ops import AttentionShape

LONG = 2048  # from here on the arithmetic outweighs the launches

aten = torch.ops.aten


def takes(rows: Rows) -> bool:
    """Whether the documents are known on the host and the longest is long."""
    return rows.lengths is not None and max(rows.lengths) > LONG


def _borders(rows: Rows) -> tuple[Tensor, int]:
    assert rows.lengths is not None
    ends = torch.tensor((0, *rows.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(rows.ids_T.device, non_blocking=True), max(rows.lengths)


def attention(x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> Tensor:
    borders, longest = _borders(rows)
    q, k, v = shape.parts(x_TC)
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=shape.scale, **_window(shape)
    )
    out_TD.copy_(out.flatten(1))
    return lse


def attention_backward(
    dout_TD: Tensor, x_TC: Tensor, out_TD: Tensor, saved: Tensor, rows: Rows, shape: AttentionShape, dx_TC: Tensor
) -> None:
    borders, longest = _borders(rows)
    q, k, v = shape.parts(x_TC)
    split = (-1, shape.size)
    seed = torch.zeros(2, dtype=torch.uint64, device=x_TC.device)  # there is no dropout to repeat
    grads = aten._flash_attention_backward(
        dout_TD.unflatten(1, split), q, k, v, out_TD.unflatten(1, split), saved, borders, borders, longest, longest,
        0.0, True, seed, seed[:0], scale=shape.scale, **_window(shape),
    )  # fmt: skip
    for grad, part in zip(grads, shape.parts(dx_TC), strict=True):
        part.copy_(grad)


def _window(shape: AttentionShape) -> dict[str, int]:
    return {} if shape.window is None else {"window_size_left": shape.window - 1, "window_size_right": 0}
