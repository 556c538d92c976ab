"""The fused step on one and on several cards of this machine: tokens/s, where the rest is lost, and equal losses.

    python benchmarks/multi_gpu.py                        # both jobs, on all cards, in under five minutes
    python benchmarks/multi_gpu.py --gpus 2 --jobs seed --repeats 50

Random weights in published shapes are made on each card. `seed` is a 1B model in NF4 with 8 conversations a card and
step, `8b` an 8B model in NF4 with 2 conversations of 4,096 tokens a card and step. One RESULT line of JSON a job:

    one_card_tokens_per_s, tokens_per_s, speedup
    lost_ms            of a step, against one card with its own share: imbalance (the slowest card beyond the mean),
                       all_reduce (by itself, all cards ready), other (host and waiting)
    largest_loss_difference   between steps of all cards and the same steps on the first card alone, relative
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes
import numpy as np
import torch
from engine_step import build, random_documents

from parley.data.packing import Document
from parley.train_step.bind import bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import make_plan
from parley.training.dealing import deal_documents
from parley.training.processes import (
    copy_from_main,
    from_all,
    joined_processes,
    process_count,
    process_rank,
    sum_in_place,
)


@dataclass(frozen=True)
class Job:
    """What a card gets in each step: `documents` of `tokens` in all."""

    shape: str
    documents: int
    tokens: int
    even: bool


JOBS = {
    "seed": Job("1b", 8, 1890, even=False),
    "8b": Job("8b", 2, 8192, even=True),
    "tiny": Job("tiny", 8, 600, even=False),  # on a CPU, to try this script
}
BATCHES = 6  # different steps, over and over: each has a captured size of its own
COMPARED = 3  # steps


class Training:
    """A model on this process's card; a call is one optimizer step on this process's share of the documents."""

    def __init__(self, job: Job, device: str) -> None:
        model = build(job.shape, "nf4" if device == "cuda" else "none", device=device)
        bound = bind(model)
        lengths = np.array([len(document.ids_L) for document in batch(job, process_count(), 0)])
        self.step = FusedStep(bound, make_plan(bound, "auto", lengths, job.documents))
        self.flat = bound.flat
        copy_from_main([self.flat.weight_Z.data])
        self.initial_Z = self.flat.weight_Z.detach().clone()
        self.device = device
        self.restart()

    def restart(self) -> None:
        with torch.no_grad():
            self.flat.weight_Z.copy_(self.initial_Z)
        optimizer = bitsandbytes.optim.AdamW8bit if self.device == "cuda" else torch.optim.AdamW
        self.optimizer = optimizer([self.flat.weight_Z], lr=2e-4, weight_decay=0.01)

    def __call__(self, share: list[Document], supervised: int, *, alone: bool) -> torch.Tensor:
        """The mean loss. `alone`: the share is the whole step."""
        self.step.forward_backward(share, supervised)
        if not alone:
            sum_in_place(self.flat.reduce_buffer)
        norm = torch.linalg.vector_norm(self.flat.grad_Z)
        self.flat.grad_Z.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.optimizer.step()
        return self.step.metrics_3[0] / supervised


def batch(job: Job, cards: int, seed: int) -> list[Document]:
    return random_documents(job.tokens * cards, job.documents * cards, 1 / 3, seed, even=job.even)


def supervised_tokens(documents: list[Document]) -> int:
    return sum(document.supervised_tokens for document in documents)


def wait_for_all() -> None:
    from_all(None)  # over the host: a waiting card stays idle


def times(device: str, actions: list[Callable[[], object]], repeats: int, *, together: bool) -> list[float]:
    """Seconds of each of `repeats` actions, until the device is done; `together`: begun by all processes at once."""
    seconds = []
    for index in range(repeats):
        if together:
            wait_for_all()
        start = time.perf_counter()
        actions[index % len(actions)]()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compare_losses(training: Training, job: Job) -> float:
    """The largest relative difference between losses of all cards and of the first one alone, on the same steps."""
    count, rank = process_count(), process_rank()
    batches = [batch(job, count, 100 + index) for index in range(COMPARED)]
    training.restart()
    together = [
        float(training(deal_documents(documents, count)[rank], supervised_tokens(documents), alone=False))
        for documents in batches
    ]
    training.restart()
    differences = [0.0]
    if rank == 0:
        alone = [float(training(documents, supervised_tokens(documents), alone=True)) for documents in batches]
        differences = [abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True)]
        print("losses on all cards:", [round(loss, 5) for loss in together], flush=True)
        print("losses on one card: ", [round(loss, 5) for loss in alone], flush=True)
    return max(from_all(max(differences))[0], 0.0)


def measure(name: str, job: Job, device: str, repeats: int, batch_count: int) -> dict[str, object]:
    """Figures are printed as soon as they are known; the comparison of losses, which is not timed, comes last."""
    count, rank = process_count(), process_rank()
    started = time.perf_counter()
    training = Training(job, device)
    progress(name, "made", started)

    batches = [batch(job, count, index) for index in range(batch_count)]
    shares = [deal_documents(documents, count)[rank] for documents in batches]
    numbers = [supervised_tokens(documents) for documents in batches]
    own = [batch(job, 1, index) for index in range(batch_count)]  # of one card by itself
    alone = [lambda d=documents: training(d, supervised_tokens(d), alone=True) for documents in own]
    together = [lambda s=share, n=n: training(s, n, alone=False) for share, n in zip(shares, numbers, strict=True)]
    compute = [
        lambda s=share, n=n: training.step.forward_backward(s, n) for share, n in zip(shares, numbers, strict=True)
    ]
    for actions in (alone, together):  # compiles, and captures each size
        times(device, actions, 2 * batch_count, together=True)
    progress(name, "warm", started)
    repeats = max(repeats // batch_count, 1) * batch_count

    one_card = times(device, alone, repeats, together=False) if rank == 0 else []
    wait_for_all()
    steps = times(device, together, repeats, together=False)
    one_card = from_all(one_card)[0]
    step, single = statistics.mean(steps), statistics.mean(one_card)
    tokens = sum(len(document.ids_L) for documents in batches for document in documents) / batch_count
    tokens_alone = sum(len(document.ids_L) for documents in own for document in documents) / batch_count
    result: dict[str, object] = dict(
        job=name, cards=count, device=torch.cuda.get_device_name() if device == "cuda" else "cpu", repeats=repeats,
        one_card_step_ms=round(1000 * single, 2), step_ms=round(1000 * step, 2),
        one_card_tokens_per_s=round(tokens_alone / single), tokens_per_s=round(tokens / step),
        speedup=round(tokens / step / (tokens_alone / single), 3),
    )  # fmt: skip
    progress(name, json.dumps(result), started)

    computed = np.array(from_all(times(device, compute, repeats, together=True)))  # cards, steps
    reduced = times(device, [lambda: sum_in_place(training.flat.reduce_buffer)], 20, together=True)
    imbalance = float((computed.max(0) - computed.mean(0)).mean())
    all_reduce = statistics.median(reduced)
    fair = [[sum(len(d.ids_L) for d in share) for share in deal_documents(documents, count)] for documents in batches]
    result |= dict(
        lost_ms=dict(
            imbalance=round(1000 * imbalance, 3), all_reduce=round(1000 * all_reduce, 3),
            other=round(1000 * (step - single - imbalance - all_reduce), 3),
        ),
        largest_share=round(statistics.mean(max(share) * count / sum(share) for share in fair), 4),
        gradient_mib=round(training.flat.reduce_buffer.nbytes / 2**20, 1),
    )  # fmt: skip
    progress(name, json.dumps(result["lost_ms"]), started)
    loss_difference = compare_losses(training, job)
    return result | dict(
        largest_loss_difference=float(f"{loss_difference:.2e}"), same_losses=loss_difference < 5e-3,
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip


def progress(name: str, what: str, started: float) -> None:
    if process_rank() == 0:
        print(f"{name}, {time.perf_counter() - started:.1f} s: {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=["seed", "8b"], choices=list(JOBS))
    parser.add_argument("--gpus", type=int, default=None, help="all of this machine without it")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batches", type=int, default=BATCHES, help="different steps, over and over")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, to try this script with --jobs tiny")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    if "WORLD_SIZE" not in os.environ:
        count = args.gpus or torch.cuda.device_count()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode)
    with joined_processes():
        for name in args.jobs:
            result = measure(name, JOBS[name], device, args.repeats, args.batches)
            if process_rank() == 0:
                print("RESULT " + json.dumps(result), flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
