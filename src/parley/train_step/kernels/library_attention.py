"""Attention of long documents through the libraries: flash-attn-4 where it is installed, else cuDNN for each long one
and PyTorch's flash kernels for the others.

On an H100 flash-attn-4 takes 28.4 ms for forward and backward of 32,767 tokens (32 heads of 64), cuDNN 35.5, PyTorch's
flash-attention 2 55.1 and the kernels of `attention.py` 60.3; with 2 x 4,095 tokens and heads of 128 the four take
2.1, 2.1, 3.7 and 4.0, without the copies of results that cuDNN alone needs (`benchmarks/long_attention.py`). It builds
a plan for each new length, which takes the host more than 100 ms: short documents, of many lengths, do not go there,
and long ones are padded to few lengths. The padding is whatever lies behind a document in the row, which causal
attention does not see; the gradient of its output is zero. So nothing is copied but results: copies of inputs took 23
of 508 ms of kernels in a step of 2 x 4,095 tokens of the 8B shape.

Shape suffixes (legend in docs/design.md): T tokens, D query columns, C query, key and value columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from parley.library_compat import flash_attn
from parley.library_compat.torch import (
    cudnn_attention,
    cudnn_attention_backward,
    varlen_flash_attention,
    varlen_flash_attention_backward,
)
from parley.train_step.long_documents import FLASH_4_HEADS, LONG_DOCUMENT, padded_length
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch

Kernel = Literal["flash 4", "cudnn", "flash 2"]


def applies(x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape) -> bool:
    """Whether the host knows the documents and the longest is long. The libraries take 16-bit types and no soft cap."""
    long = batch.lengths is not None and max(batch.lengths) >= LONG_DOCUMENT
    return long and shape.softcap is None and x_TC.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Run:
    """Rows of one long document, or of the short ones between two of these."""

    rows: slice
    boundaries: Tensor | None  # of the short documents; None for a long one
    longest: int

    def padded(self, x_TC: Tensor) -> Tensor:
        """As many rows as cuDNN has a plan for, from the first of a long document on, in the strides of `x_TC`.

        What lies behind the document stays there: its queries do not see it. A copy with zeros where `x_TC` ends.
        """
        length = padded_length(self.longest)
        if self.rows.start + length <= len(x_TC):
            return x_TC[self.rows.start : self.rows.start + length]
        copy = x_TC.new_zeros(length, x_TC.stride(0))[:, : x_TC.shape[1]]
        copy[: self.longest] = x_TC[self.rows]
        return copy

    @contextmanager
    def zeros_behind(self, x_TD: Tensor) -> Iterator[Tensor]:
        """`padded`, with zeros behind the document until the block ends."""
        rows_LD = self.padded(x_TD)
        behind = rows_LD[self.longest :]
        before = behind.clone()
        behind.zero_()
        yield rows_LD
        behind.copy_(before)

    def unpadded(self, x_1HLE: Tensor) -> Tensor:
        return x_1HLE[0, :, : self.longest].transpose(0, 1)


def _by_head(x_LHE: Tensor) -> Tensor:
    """As cuDNN takes it, (1, H, L, E), in place."""
    return x_LHE.transpose(0, 1)[None]


@cache
def _has_flash_4(device: torch.device) -> bool:
    return flash_attn.usable(device)


@cache
def _max_cudnn_head(device: torch.device) -> int:
    """As PyTorch's own dispatch to cuDNN has it, which calls of the operator go around."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == flash_attn.HOPPER
    return 256 if hopper else 128


def _kernel(device: torch.device, shape: AttentionShape) -> Kernel:
    """cuDNN's operator has no window, and neither library's backward pass adds in a fixed order here; PyTorch's flash
    kernels follow torch's deterministic algorithms.
    """
    if shape.window is not None or torch.are_deterministic_algorithms_enabled():
        return "flash 2"
    if shape.head_dim in FLASH_4_HEADS and _has_flash_4(device):
        return "flash 4"
    return "cudnn" if shape.head_dim <= _max_cudnn_head(device) else "flash 2"


def _runs(batch: DeviceBatch, kernel: Kernel) -> list[_Run]:
    """The runs of `batch`, whose boundaries are copied to the device once a pass; cuDNN takes one at a time."""
    by_cudnn = kernel == "cudnn"
    if by_cudnn not in batch.runs:
        batch.runs[by_cudnn] = _split(batch, by_cudnn=by_cudnn)
    return batch.runs[by_cudnn]


def _split(batch: DeviceBatch, *, by_cudnn: bool) -> list[_Run]:
    assert batch.lengths is not None
    runs, begin, short = [], 0, [0]
    for length in (*batch.lengths, None):  # None flushes the last run
        by_itself = length is not None and length >= LONG_DOCUMENT and by_cudnn
        if (by_itself or length is None) and len(short) > 1:
            # The library's kernels take cumulative lengths as int32 on the device.
            boundaries = torch.tensor(short, dtype=torch.int32).to(batch.ids_T.device, non_blocking=True)
            longest = max(b - a for a, b in itertools.pairwise(short))
            runs.append(_Run(slice(begin, begin + short[-1]), boundaries, longest))
            begin, short = begin + short[-1], [0]
        if length is not None and by_itself:
            runs.append(_Run(slice(begin, begin + length), None, length))
            begin += length
        elif length is not None:
            short.append(short[-1] + length)
    return runs


def _zero_padding(out: Tensor, batch: DeviceBatch) -> None:
    """The libraries write documents alone, and NaN left in padding rows would spread to the adapters' gradients."""
    assert batch.lengths is not None
    out[sum(batch.lengths) :].zero_()


def attention(x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor) -> list[Any]:
    """Returns, for each run of `_runs`, the state that its backward operator reads."""
    kernel, qkv = _kernel(x_TC.device, shape), shape.split_qkv(x_TC)
    saved: list[Any] = []
    _zero_padding(out_TD, batch)
    for run in _runs(batch, kernel):
        if run.boundaries is None:
            q, k, v = map(_by_head, shape.split_qkv(run.padded(x_TC)))
            out, state = cudnn_attention(q, k, v, shape.scale)
            out_TD[run.rows] = run.unpadded(out).flatten(1)
            saved.append(state)
            continue
        q, k, v = (part[run.rows] for part in qkv)
        if kernel == "flash 4":
            out = out_TD[run.rows].unflatten(1, (-1, shape.head_dim))
            saved.append(flash_attn.flash_attention_4(q, k, v, run.boundaries, run.longest, shape.scale, out))
        else:
            out, lse = varlen_flash_attention(q, k, v, run.boundaries, run.longest, shape.scale, shape.window)
            out_TD[run.rows] = out.flatten(1)
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
    tensors, grads_TC = (dout_THE, *shape.split_qkv(x_TC), out_THE), shape.split_qkv(dx_TC)
    kernel = _kernel(x_TC.device, shape)
    _zero_padding(dx_TC, batch)
    for run, state in zip(_runs(batch, kernel), saved, strict=True):
        if run.boundaries is None:
            q, k, v = map(_by_head, shape.split_qkv(run.padded(x_TC)))
            out = _by_head(run.padded(out_TD).unflatten(1, (-1, shape.head_dim)))
            with run.zeros_behind(dout_TD) as dout_LD:  # queries behind the document add nothing to its gradients
                dout = _by_head(dout_LD.unflatten(1, (-1, shape.head_dim)))
                dq, dk, dv = cudnn_attention_backward(dout, q, k, v, out, state, shape.scale)
            grads = run.unpadded(dq), run.unpadded(dk), run.unpadded(dv)
        else:
            dout, q, k, v, out = (part[run.rows] for part in tensors)
            where = (run.boundaries, run.longest, shape.scale)
            if kernel == "flash 4":
                in_place = [part[run.rows] for part in grads_TC]
                flash_attn.flash_attention_4_backward(dout, q, k, v, out, state, *where, in_place)
                continue
            grads = varlen_flash_attention_backward(dout, q, k, v, out, state, *where, shape.window)
        for grad, part in zip(grads, grads_TC, strict=True):
            part[run.rows] = grad
