"""Attention of one document by each kernel, forward and backward: ms of a new length, and of one that it knows.

    python benchmarks/attention_lengths.py --heads 24 --kv-heads 8 --head-dim 128 --lengths 2100 3538 4095 8191

`triton` is kernels/attention.py, `cudnn` and `flash` are what kernels/library_attention.py chooses from; `padded` is
cuDNN as it is called there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from parley.data.packing import Document
from parley.library_compat.torch import (
    cudnn_attention,
    cudnn_attention_backward,
    varlen_flash_attention,
    varlen_flash_attention_backward,
)
from parley.train_step.kernels import library_attention
from parley.train_step.kernels.attention import attention, attention_backward
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import StagingBuffer, pack

DEVICE = torch.device("cuda")


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / repeats


def kernels(shape: AttentionShape, length: int) -> dict[str, Callable[[], Any]]:
    packed = pack([Document.from_lists(np.zeros(length), np.zeros(length))])
    known = StagingBuffer(DEVICE, length).upload(packed, 1.0, packed.lengths)
    unknown = StagingBuffer(DEVICE, length).upload(packed, 1.0, None)
    x = torch.randn(length, shape.columns, device=DEVICE, dtype=torch.bfloat16)
    out, dout = (torch.randn(length, shape.heads * shape.head_dim, device=DEVICE, dtype=x.dtype) for _ in range(2))
    dx = torch.empty_like(x)
    boundaries = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)

    def triton() -> None:
        attention_backward(dout, x, out, attention(x, unknown, shape, out), unknown, shape, dx)

    def padded() -> None:
        saved = library_attention.attention(x, known, shape, out)
        library_attention.attention_backward(dout, x, out, saved, known, shape, dx)

    def cudnn() -> None:
        q, k, v = (part.transpose(0, 1)[None] for part in shape.split_qkv(x))
        d = dout.unflatten(1, (-1, shape.head_dim)).transpose(0, 1)[None]
        result, state = cudnn_attention(q, k, v, shape.scale)
        cudnn_attention_backward(d, q, k, v, result, state, shape.scale)

    def flash() -> None:
        q, k, v = shape.split_qkv(x)
        d = dout.unflatten(1, (-1, shape.head_dim))
        result, lse = varlen_flash_attention(q, k, v, boundaries, length, shape.scale, None)
        varlen_flash_attention_backward(d, q, k, v, result, lse, boundaries, length, shape.scale, None)

    return {"triton": triton, "padded": padded, "cudnn": cudnn, "flash": flash}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[3000, 2100, 3538, 3541, 4095, 8191])
    args = parser.parse_args()
    shape = AttentionShape(args.heads, args.kv_heads, args.head_dim, args.head_dim**-0.5)
    for length in args.lengths:  # the first one loads and compiles what all need
        result: dict[str, Any] = {"length": length}
        for name, run in kernels(shape, length).items():
            result[name] = [round(milliseconds(run, 1), 1), round(milliseconds(run, 10), 2)]
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
