"""The fused step of the jobs `long`, `8b` and `8b-short`, under several memory limits.

    python benchmarks/job_steps.py --shape 8b
    python benchmarks/job_steps.py --shape 1b --kernels 20

Prints one RESULT line of JSON a job and limit: ms of a step in a row of steps (as a trainer has it) and alone, and
the peak; with `--kernels` the kernels by their share. `graph` captures a pass whatever its threshold says.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import numpy as np
import torch
from engine_step import build, list_kernels, milliseconds, random_documents

from parley.data.packing import Document
from parley.library_compat import flash_attn
from parley.train_step.bind import bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.graph_threshold import EAGER_PASSES
from parley.train_step.memory_plan import make_plan
from parley.train_step.optimizer import AdamW8bit
from parley.units import GIB

# Tokens, documents, share supervised; limits in GiB.
JOBS: dict[str, list[tuple[str, int, int, float, tuple[Any, ...]]]] = {
    "8b": [("8b", 8190, 2, 1.0, ("auto", 8.1)), ("8b-short", 1890, 8, 1 / 3, ("auto", "graph"))],
    "1b": [("long", 32767, 1, 1.0, ("auto", 5.0)), ("seed", 1890, 8, 1 / 3, ("auto", "graph"))],
}


class Loop:
    """One plan's step and optimizer; a call is one optimizer step, as the trainer does it."""

    def __init__(self, bound: Any, documents: list[Document], memory: Any) -> None:
        for linear in bound.linears:
            linear.matrix = None  # of another plan
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        lengths = np.array([len(document.ids_L) for document in documents])
        plan = make_plan(bound, "auto" if memory == "graph" else memory, lengths, len(documents))
        print("\n".join(plan.describe()), flush=True)
        self.step = FusedStep(bound, plan)
        self.step.compile()
        self.step.prepare_attention(lengths)
        if memory == "graph" and self.step.graphs is not None:
            self.step.graphs.threshold.passes = EAGER_PASSES
        self.optimizer = AdamW8bit([bound.flat.weight_Z], lr=2e-4, weight_decay=0.01)
        self.flat = bound.flat

    def __call__(self, documents: list[Document]) -> None:
        self.step.forward_backward(documents, sum(document.supervised_tokens for document in documents))
        norm = torch.linalg.vector_norm(self.flat.grad_Z)
        self.flat.grad_Z.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.optimizer.step()


def in_a_row(loop: Loop, documents: list[Document], steps: int) -> float:
    """ms of a step where the host runs ahead."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        loop(documents)
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=sorted(JOBS))
    parser.add_argument("--jobs", nargs="+", help="of the shape's; all without")
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps in a row")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--limits", nargs="+", help="of those of a job: auto, graph or GiB; all without")
    parser.add_argument("--pause", action="store_true", help="wait for a line of input when the model is built")
    args = parser.parse_args()
    start = time.perf_counter()
    bound = bind(build(args.shape, "nf4"))
    print(f"{args.shape} built in {time.perf_counter() - start:.0f} s", flush=True)
    if args.pause:
        input()
    for job, tokens, count, supervised, limits in JOBS[args.shape]:
        if args.jobs and job not in args.jobs:
            continue
        documents = random_documents(tokens, count, supervised, tokens, even=tokens > 2000)
        for memory in (limit for limit in limits if not args.limits or str(limit) in args.limits):
            loop = Loop(bound, documents, memory)
            for _ in range(4):
                loop(documents)
            wall, host, _ = milliseconds(loop, documents, 4)  # type: ignore[arg-type]
            row = in_a_row(loop, documents, max(3, int(1000 * args.seconds / wall)))
            result = dict(
                job=job, memory=memory, saved=loop.step.plan.saved, cached=loop.step.plan.cache_matrices,
                mlp_rows=loop.step.plan.mlp_rows, tokens=tokens, flash_4=flash_attn.usable(torch.device("cuda")),
                in_a_row_ms=round(row, 2), alone_ms=round(wall, 2), host_ms=round(host, 2),
                graphs=len(loop.step.graphs.captured) if loop.step.graphs is not None else 0,
                peak_allocated_gib=round(torch.cuda.max_memory_allocated() / GIB, 2),
                peak_reserved_gib=round(torch.cuda.max_memory_reserved() / GIB, 2),
                predicted_gib=round(loop.step.plan.predicted_bytes / GIB, 2),
                loss=round(float(loop.step.metrics_3[0]) / sum(d.supervised_tokens for d in documents), 4),
            )  # fmt: skip
            print("RESULT " + json.dumps(result), flush=True)
            if args.kernels:
                list_kernels(loop, documents, args.kernels)  # type: ignore[arg-type]
            del loop


if __name__ == "__main__":
    main()
