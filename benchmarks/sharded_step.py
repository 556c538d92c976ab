"""A model larger than a card, cut over the cards of this machine: tokens/s against arithmetic, GiB against the plan.

    python benchmarks/sharded_step.py --gpus 2                      # the 70B shape in NF4, 20 steps of a row a card
    python benchmarks/sharded_step.py --gpus 2 --cpu --shape tiny   # to try this script

Random weights are made slice by slice: each process makes and quantises its own rows, and none ever holds more. LoRA
(r = 16 on all projections) is trained on random documents, with activations recomputed layer by layer. One RESULT line
of JSON: tokens_per_s and the share of it that matrix products at the cards' peak would allow, losses, and the memory of
a card beside what `parley plan` counts for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from typing import Any

import bitsandbytes
import numpy as np
import torch
from engine_step import random_documents
from shapes import SHAPES
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from parley.config import LoraSection, ModelSection
from parley.data.packing import Document
from parley.models.adapters import attach_lora
from parley.models.meta_model import meta_model
from parley.models.sharding import empty_model, fill, local_bytes, shard
from parley.train_step.captured_step import CapturedStep
from parley.training.dealing import deal_documents
from parley.training.optimizer_memory import state_bytes
from parley.training.plan.device import planned_device
from parley.training.plan.memory import Batches, MemoryEstimate, joint_estimate
from parley.training.plan.step_time import peaks
from parley.training.processes import (
    copy_from_main,
    from_all,
    joined_processes,
    process_count,
    process_rank,
    sum_all_in_place,
)
from parley.units import GIB

WARM_UP = 3


class RandomWeights:
    """Rows of random weights, made on the device as they are asked for; a WeightSource of models/sharding.py."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.generator = torch.Generator(device).manual_seed(process_rank())

    def rows(self, name: str, rows: slice) -> Tensor:
        module = self.model.get_submodule(name.rpartition(".")[0])
        count = rows.stop - rows.start
        if "norm" in name:
            return torch.ones(count, device=self.device)
        columns = module.in_features if isinstance(module, torch.nn.Linear) else module.embedding_dim
        made = torch.empty(count, columns, dtype=self.model.dtype, device=self.device)
        return made.normal_(0, 0.02, generator=self.generator)


def build(shape: str, nf4: bool, device: torch.device) -> Any:
    """A sharded model of this shape with an adapter."""
    config = AutoConfig.for_model(
        **(dict(vocab_size=128256, max_position_embeddings=32768, pad_token_id=0) | SHAPES[shape])
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = empty_model(config, dtype, nf4=nf4, double=True)
    shard(model, device)
    fill(model, RandomWeights(model, device), device)
    model = attach_lora(model, LoraSection(), seed=0).train()
    copy_from_main([parameter.data for parameter in model.parameters() if parameter.requires_grad])
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def planned(shape: str, nf4: bool, device: torch.device, tokens: int) -> MemoryEstimate:
    """What `parley plan` counts for a process."""
    config = AutoConfig.for_model(
        **(dict(vocab_size=128256, max_position_embeddings=32768, pad_token_id=0) | SHAPES[shape])
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    section = ModelSection(name=shape, quantization="nf4" if nf4 else "none")
    model = meta_model(config, section, dtype, LoraSection(), 0)
    batches = Batches(np.full(1, tokens), 1, 1, tokens)
    compute = torch.bfloat16 if device.type == "cuda" else None
    return joint_estimate(
        model, batches, state_bytes("adamw_8bit"), compute, True, planned_device(device, None), process_count()
    )


class Training:
    def __init__(self, model: Any, tokens: int, device: torch.device) -> None:
        self.step = CapturedStep(model, tokens=tokens, autocast=torch.bfloat16 if device.type == "cuda" else None)
        make = bitsandbytes.optim.AdamW8bit if device.type == "cuda" else torch.optim.AdamW
        self.optimizer = make(self.step.trained, lr=2e-4, weight_decay=0.01)

    def __call__(self, documents: list[Document]) -> float:
        """A step; its mean loss."""
        supervised = sum(document.supervised_tokens for document in documents)
        shares = deal_documents(documents, process_count())
        passes = max(map(self.step.count_passes, shares))
        self.step.forward_backward(shares[process_rank()], supervised, passes)
        sum_all_in_place([*self.step.gradients, self.step.metrics_3])
        torch.nn.utils.clip_grad_norm_(self.step.trained, 1.0)
        self.optimizer.step()
        return float(self.step.metrics_3[0]) / supervised


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    count = process_count()
    started = time.perf_counter()
    model = build(args.shape, not args.bf16, device)
    made = time.perf_counter() - started
    if process_rank() == 0:
        print(f"made in {made:.1f} s", flush=True)
    made_gib = from_all(torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0)
    training = Training(model, args.tokens, device)
    losses, seconds = [], []
    for index in range(args.steps):
        documents = random_documents(args.tokens * count, count, 1 / 2, index % 4, even=True)
        from_all(None)
        start = time.perf_counter()
        losses.append(training(documents))
        seconds.append(time.perf_counter() - start)
        if process_rank() == 0:
            print(
                f"step {index + 1}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}, {used_gib(device):.2f} GiB", flush=True
            )
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name}
    sizes = {name: m.in_features * m.out_features for name, m in linears.items()}
    head_weights = head.in_features * head.out_features
    matrix_weights = sum(sizes.values()) - head_weights
    step = statistics.median(seconds[WARM_UP:])
    tokens = args.tokens * count
    # Forward, recomputed, and the gradient of the input: nothing else of a frozen matrix; a head for half of the rows.
    flops = (3 * 2 * matrix_weights + 3 * head_weights) * tokens
    peak, _ = peaks(torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    used = from_all(used_gib(device))
    return dict(
        shape=args.shape, cards=count, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        parameters_b=round((matrix_weights + 2 * head_weights) / 1e9, 2), made_s=round(made, 1),
        weights_gib_a_card=round(local_bytes(model) / GIB, 2), most_gib_while_made=round(max(made_gib), 2),
        steps=args.steps, tokens_a_step=tokens, step_ms=round(1000 * step, 1), tokens_per_s=round(tokens / step),
        share_of_peak=round(flops / count / step / peak, 3), first_loss=round(losses[0], 4),
        last_loss=round(losses[-1], 4), finite=all(map(math.isfinite, losses)),
        gib_a_card=round(max(used), 2),
        allocated_gib=round(torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0, 2),
    )  # fmt: skip


def used_gib(device: torch.device) -> float:
    """The most of this process's card so far, with the context and libraries."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()) / GIB


def print_plan(args: argparse.Namespace, device: torch.device) -> None:
    estimate = planned(args.shape, not args.bf16, device, args.tokens)
    parts = {name: round(size / GIB, 2) for name, size in estimate.parts.items()}
    print("PLAN " + json.dumps(dict(planned_gib=round(estimate.peak_bytes / GIB, 2), parts=parts)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="70b", choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, default=None, help="all of this machine without it")
    parser.add_argument("--tokens", type=int, default=2048, help="of the row of each card")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="weights in 16 bits in place of NF4")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, to try this script with --shape tiny")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        count = args.gpus or torch.cuda.device_count()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode)
    with joined_processes():
        device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
        try:
            result = measure(args, device)
        except Exception:  # before the launcher ends this process because another one has ended
            traceback.print_exc()
            raise
        if process_rank() == 0:
            print("RESULT " + json.dumps(result), flush=True)
            print_plan(args, device)


if __name__ == "__main__":
    main()
