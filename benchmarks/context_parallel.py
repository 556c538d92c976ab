"""One conversation split over the cards of this machine: tokens/s, GiB a card, and the gradient of one card.

    python benchmarks/context_parallel.py --gpus 2                             # 131,072 tokens of the 8B shape in NF4
    python benchmarks/context_parallel.py --gpus 2 --cpu --shape tiny --tokens 300 --compared 90   # to try this script

Random weights in NF4 with LoRA (r = 16 on all projections); activations are recomputed layer by layer, and the last
2,048 tokens are supervised. Two RESULT lines of JSON: first loss and gradient of a shorter row (three documents) split
over all cards against one card with the whole row, then steps of the long row.
"""

from __future__ import annotations

import argparse
import json
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
from engine_step import SHAPES, build
from torch import nn

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.captured_step import CapturedStep
from parley.train_step.context_parallel import ContextGroup
from parley.training.plan.step_time import peaks
from parley.training.processes import (
    copy_from_main,
    from_all,
    from_main,
    joined_processes,
    process_count,
    process_rank,
    sum_all_in_place,
)
from parley.units import GIB

SHAPES["tiny"] = dict(
    model_type="llama", vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
SUPERVISED = 2048


def row(tokens: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(0, 32000, tokens)
    return Document.from_lists(ids, np.where(np.arange(tokens) >= tokens - SUPERVISED, ids, IGNORE_INDEX))


def step_for(model: nn.Module, tokens: int, device: torch.device, *, together: bool) -> CapturedStep:
    context = ContextGroup(process_rank(), process_count()) if together else None
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return CapturedStep(model, tokens=tokens, autocast=autocast, graphs=False, context=context)


def gradient(step: CapturedStep, documents: list[Document], *, together: bool) -> tuple[float, torch.Tensor]:
    supervised = sum(document.supervised_tokens for document in documents)
    step.forward_backward(documents, supervised)
    if together:
        sum_all_in_place([*step.gradients, step.metrics_3])
    return float(step.metrics_3[0]) / supervised, torch.cat([g.flatten().float() for g in step.gradients])


def compare(model: nn.Module, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same three documents on all cards together and on each alone."""
    tokens = args.compared
    documents = [row(tokens // 6, 1), row(tokens // 3, 2), row(tokens // 2, 3)]
    generator = torch.Generator().manual_seed(0)
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    for parameter in trained.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    loss, ours = gradient(step_for(model, tokens, device, together=True), documents, together=True)
    alone, theirs = gradient(step_for(model, tokens, device, together=False), documents, together=False)
    error = float((ours - theirs).norm() / theirs.norm())
    for parameter in trained.values():
        parameter.data.zero_()
    model.zero_grad()
    return dict(
        compared_tokens=tokens, cards=process_count(), loss=round(loss, 6), loss_on_one_card=round(alone, 6),
        relative_gradient_error=float(f"{error:.2e}"),
    )  # fmt: skip


def long_steps(model: nn.Module, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    step = step_for(model, args.tokens, device, together=True)
    make = bitsandbytes.optim.AdamW8bit if device.type == "cuda" else torch.optim.AdamW
    optimizer = make(step.trained, lr=2e-4, weight_decay=0.01)
    losses, seconds = [], []
    for index in range(args.steps):
        from_all(None)
        start = time.perf_counter()
        loss, _ = gradient(step, [row(args.tokens, index)], together=True)
        torch.nn.utils.clip_grad_norm_(step.trained, 1.0)
        optimizer.step()
        losses.append(loss)
        seconds.append(time.perf_counter() - start)
        if process_rank() == 0:
            print(f"step {index + 1}: {seconds[-1]:.2f} s, loss {loss:.4f}", flush=True)
    config = model.get_base_model().config
    matrices = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    # Forward, recomputed, and the input's gradient; attention's backward pass has five products for two.
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * args.tokens**2
    flops = 6 * matrices * args.tokens + attention * (2 + 2.5)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    median = statistics.median(seconds)
    gib = [0.0]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        gib = from_all((torch.cuda.max_memory_reserved() + total - free - torch.cuda.memory_reserved()) / GIB)
    return dict(
        shape=args.shape, cards=process_count(), device=name, tokens=args.tokens, steps=args.steps,
        step_s=round(median, 2), tokens_per_s=round(args.tokens / median),
        share_of_peak=round(flops / process_count() / median / peaks(name)[0], 3),
        losses=[round(loss, 4) for loss in losses], gib_a_card=round(max(gib), 2),
        allocated_gib=round(torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0, 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, default=None, help="all of this machine without it")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--compared", type=int, default=6144, help="tokens of the row that one card trains on, too")
    parser.add_argument("--steps", type=int, default=2, help="the comparison before has warmed up")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, to try this script with --shape tiny")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        count = args.gpus or torch.cuda.device_count()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode)
    with joined_processes():
        device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
        SHAPES[args.shape]["max_position_embeddings"] = max(args.tokens, 32768)
        model = build(args.shape, "none" if args.cpu else "nf4", device=device.type)
        copy_from_main([parameter.data for parameter in model.parameters() if parameter.requires_grad])
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        try:
            for measure in (compare, long_steps):
                result = measure(model, args, device)
                if process_rank() == 0:
                    print("RESULT " + json.dumps(result), flush=True)
                from_main(None)
        except Exception:  # before the launcher ends this process because another one has ended
            traceback.print_exc()
            raise


if __name__ == "__main__":
    main()
