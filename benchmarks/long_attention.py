"""Attention of long or short documents by each kernel: ms and TFLOP/s of forward and backward, and errors.

    python benchmarks/long_attention.py --head-dim 64 --tokens 32767
    python benchmarks/long_attention.py --head-dim 128 --tokens 4095 4095
    python benchmarks/long_attention.py --head-dim 128 --tokens 120 450 236 90 300 200 180 314 --graph

`triton` is kernels/attention.py; `cudnn as called` is kernels/library_attention.py, with its copies; `cudnn`, `flash 2`
and `flash 4` are operators alone, the last one over the rows as they lie. FLOPs are those of the causal half of all
pairs: 2 products forward, 5 backward. Errors are against float32 on documents of 1,100 tokens in all, relative to the
norm.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from parley.data.packing import Document
from parley.library_compat import flash_attn
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
CHECKED = [700, 1, 399]  # tokens of the documents that errors are measured on
Pair = tuple[Callable[[], Any], Callable[[Any], Any]]  # forward, and backward of what forward returned


class Case:
    """Inputs of random numbers, and buffers of the results: one row of each token, as the fused step has them."""

    def __init__(self, shape: AttentionShape, lengths: list[int]) -> None:
        self.shape, self.lengths = shape, lengths
        tokens, columns = sum(lengths), shape.heads * shape.head_dim
        packed = pack([Document.from_lists(np.zeros(n), np.zeros(n)) for n in lengths])
        self.known = StagingBuffer(DEVICE, tokens).upload(packed, 1.0, packed.lengths)
        self.unknown = StagingBuffer(DEVICE, tokens).upload(packed, 1.0, None)
        edges = [0, *np.cumsum(lengths).tolist()]
        self.boundaries = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        torch.manual_seed(0)
        self.x = torch.randn(tokens, shape.columns, device=DEVICE, dtype=torch.bfloat16)
        self.dout = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16)
        # Rows as wide as the step's, whose LoRA columns lie behind.
        self.out = torch.full((tokens, columns + 16), math.nan, device=DEVICE, dtype=torch.bfloat16)[:, :columns]
        dx = torch.full((tokens, shape.columns + 48), math.nan, device=DEVICE, dtype=torch.bfloat16)
        self.dx = dx[:, : shape.columns]

    def by_head(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(1, (-1, self.shape.head_dim))

    def kernels(self) -> dict[str, Pair]:
        shape, known, unknown = self.shape, self.known, self.unknown
        x, out, dout, dx = self.x, self.out, self.dout, self.dx
        q, k, v = shape.split_qkv(x)
        longest, edges = max(self.lengths), self.boundaries
        pairs: dict[str, Pair] = {
            "triton": (
                lambda: attention(x, unknown, shape, out),
                lambda lse: attention_backward(dout, x, out, lse, unknown, shape, dx),
            ),
            "flash 2": (
                lambda: varlen_flash_attention(q, k, v, edges, longest, shape.scale, None),
                lambda r: varlen_flash_attention_backward(
                    self.by_head(dout), q, k, v, *r, edges, longest, shape.scale, None
                ),
            ),
        }
        if library_attention.applies(x, known, shape):
            pairs["cudnn as called"] = (
                lambda: library_attention.attention(x, known, shape, out),
                lambda saved: library_attention.attention_backward(dout, x, out, saved, known, shape, dx),
            )
        if len(set(self.lengths)) == 1:
            pairs["cudnn"] = self._cudnn()
        if flash_attn.usable(DEVICE):
            pairs["flash 4"] = (
                lambda: flash_attn.flash_attention_4(
                    q, k, v, edges, longest, shape.scale, self.by_head(out)
                ),
                lambda lse: flash_attn.flash_attention_4_backward(
                    self.by_head(dout), q, k, v, self.by_head(out), lse, edges, longest, shape.scale,
                    shape.split_qkv(dx),
                ),
            )  # fmt: skip
        return pairs

    def _cudnn(self) -> Pair:
        """On copies in its layout, (documents, heads, length, head size), which are not timed."""

        def batched(x_THE: Tensor) -> Tensor:
            return x_THE.unflatten(0, (len(self.lengths), -1)).transpose(1, 2).contiguous()

        q, k, v = map(batched, self.shape.split_qkv(self.x))
        dout = batched(self.by_head(self.dout))

        def backward(result: Any) -> None:
            cudnn_attention_backward(dout, q, k, v, *result, self.shape.scale)

        return lambda: cudnn_attention(q, k, v, self.shape.scale), backward


def exact(case: Case) -> list[Tensor]:
    """Output and gradient of the rows x, in float32, one document at a time."""
    x = case.x.float().requires_grad_()
    parts = []
    for begin, end in zip(case.boundaries.tolist(), case.boundaries.tolist()[1:], strict=False):
        q, k, v = (part.transpose(0, 1)[None] for part in case.shape.split_qkv(x[begin:end]))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.shape.scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1).flatten(1))
    out = torch.cat(parts)
    return [out.detach(), *torch.autograd.grad(out, [x], case.dout.float())]


def errors(shape: AttentionShape) -> dict[str, list[float]]:
    """Relative error of output and gradient, of the kernels that write into the step's buffers."""
    case = Case(shape, CHECKED)
    wanted, found = exact(case), {}
    for name, (forward, backward) in case.kernels().items():
        if name in ("triton", "flash 4"):
            case.out.fill_(math.nan)
            case.dx.fill_(math.nan)
            backward(forward())
            pairs = zip((case.out, case.dx), wanted, strict=True)
            found[name] = [float((ours.float() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    return found


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls by events, after one that is not counted."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def replayed_milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The same of a call inside a CUDA graph of ten: without the host's part, which is most of a short document's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    return milliseconds(graph.replay, repeats) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32767], help="of each document")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graph", action="store_true", help="time calls inside a CUDA graph, for short documents")
    args = parser.parse_args()
    shape = AttentionShape(args.heads, args.kv_heads, args.head_dim, args.head_dim**-0.5)
    for name, error in errors(shape).items():
        print(f"head {args.head_dim} {name:16} error of output {error[0]:.2e}, of the gradient {error[1]:.2e}")
    case = Case(shape, args.tokens)
    flops = sum(2 * n**2 * args.heads * args.head_dim for n in args.tokens)
    for name, (forward, backward) in case.kernels().items():
        start = time.perf_counter()
        saved = forward()
        backward(saved)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        timed = replayed_milliseconds if args.graph else milliseconds
        forward_ms = timed(forward, args.repeats)
        backward_ms = timed(lambda: backward(saved), args.repeats)  # noqa: B023
        result = dict(
            tokens=args.tokens, heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim, kernel=name,
            forward_ms=round(forward_ms, 3), backward_ms=round(backward_ms, 3),
            forward_tflops=round(flops / forward_ms / 1e9), backward_tflops=round(2.5 * flops / backward_ms / 1e9),
            both_ms=round(forward_ms + backward_ms, 3), first_s=round(first, 1),
        )  # fmt: skip
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
