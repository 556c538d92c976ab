"""One conversation split over the cards of this machine: tokens/s, GiB a card, and the gradient of one card.

    python benchmarks/context_parallel.py --gpus 2                             # 131,072 tokens of the 8B shape in NF4
    python benchmarks/context_parallel.py --gpus 2 --cpu --shape tiny --tokens 300 --compared 90   # to try this script

Random weights with LoRA (r = 16 on all projections). RESULT lines of JSON:

    gradients  of a shorter row (three documents) through the first layers, split over all cards and on one card with
               the whole row, in float32 and in bfloat16: float32 shows that both compute the same, and the distance
               of bfloat16 from float32 on one card how much of the rest is rounding
    steps      of the long row in NF4, activations recomputed layer by layer, the last 2,048 tokens supervised
    attention  of the slowest card's two chunks in all layers, forward, recomputed and backward, by itself: as the step
               takes it (cuDNN in two blocks, where they are long) and by flash-attention 2; and its gathers
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import bitsandbytes
import numpy as np
import torch
from engine_step import build
from shapes import SHAPES
from sharded_step import used_gib
from torch import Tensor, nn

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document
from parley.train_step.captured_step import CapturedStep
from parley.train_step.chunk_attention import FlashChunk, attend
from parley.train_step.context_parallel import ContextGroup, GatherTokens, split
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import pack
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

SUPERVISED = 2048


def row(tokens: int, seed: int) -> Document:
    ids = np.random.default_rng(seed).integers(0, 32000, tokens)
    return Document.from_lists(ids, np.where(np.arange(tokens) >= tokens - SUPERVISED, ids, IGNORE_INDEX))


def step_for(model: nn.Module, tokens: int, *, together: bool, autocast: torch.dtype | None) -> CapturedStep:
    context = ContextGroup(process_rank(), process_count()) if together else None
    return CapturedStep(model, tokens=tokens, autocast=autocast, graphs=False, context=context)


def gradient(step: CapturedStep, documents: list[Document], *, together: bool) -> tuple[float, Tensor]:
    supervised = sum(document.supervised_tokens for document in documents)
    step.forward_backward(documents, supervised)
    if together:
        sum_all_in_place([*step.gradients, step.metrics_3])
    return float(step.metrics_3[0]) / supervised, torch.cat([g.flatten().float() for g in step.gradients])


def compare(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The same three documents on all cards together and on each alone."""
    tokens = args.compared
    documents = [row(tokens // 6, 1), row(tokens // 3, 2), row(tokens // 2, 3)]
    model = build(args.shape, "none", layers=args.layers, device=device.type, positions=max(args.tokens, 32768))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    copy_from_main([parameter.data for parameter in model.parameters() if parameter.requires_grad])
    found = {}
    for precision in ("bf16", "fp32") if device.type == "cuda" else ("fp32",):
        model = model.float() if precision == "fp32" else model
        autocast = torch.bfloat16 if precision == "bf16" else None
        for where in ("split", "alone"):
            together = where == "split"
            step = step_for(model, tokens, together=together, autocast=autocast)
            found[precision, where] = gradient(step, documents, together=together)
    _, exact = found["fp32", "alone"]
    errors = {
        f"{precision}_{where}": float(f"{float((ours - exact).norm() / exact.norm()):.2e}")
        for (precision, where), (_, ours) in found.items()
    }
    losses = {f"{precision}_{where}": round(loss, 6) for (precision, where), (loss, _) in found.items()}
    return dict(
        what="gradients", compared_tokens=tokens, cards=process_count(), layers=args.layers, losses=losses,
        relative_error_against_fp32_alone=errors,
    )  # fmt: skip


def long_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    model = build(
        args.shape,
        "nf4" if device.type == "cuda" else "none",
        device=device.type,
        positions=max(args.tokens, 32768),
    )
    copy_from_main([parameter.data for parameter in model.parameters() if parameter.requires_grad])
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def long_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = long_model(args, device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    if process_rank() == 0:
        print("steps: the model is made", flush=True)
    step = step_for(model, args.tokens, together=True, autocast=autocast)
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
            print(f"step {index + 1}: {seconds[-1]:.2f} s, loss {loss:.4f}, {used_gib(device):.2f} GiB", flush=True)
    config = model.get_base_model().config
    matrices = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    # Forward, recomputed, and the input's gradient; attention's backward pass has five products for two.
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * args.tokens**2
    flops = 6 * matrices * args.tokens + attention * (2 + 2.5)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    step_s = min(seconds)  # the first one builds cuDNN's plans
    floor = flops / process_count() / peaks(name)[0]
    gib = from_all(used_gib(device))
    return dict(
        what="steps", shape=args.shape, cards=process_count(), device=name, tokens=args.tokens, steps=args.steps,
        step_s=round(step_s, 2), tokens_per_s=round(args.tokens / step_s), floor_s_at_peak=round(floor, 2),
        attention_share_of_operations=round(attention * (2 + 2.5) / flops, 3), share_of_peak=round(floor / step_s, 3),
        losses=[round(loss, 4) for loss in losses], gib_a_card=round(max(gib), 2),
        allocated_gib=round(torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0, 2),
    )  # fmt: skip


def attention_alone(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of a step in attention of this shape's layers, by itself, on the slowest card; with one process, of the
    first of two.
    """
    sizes = SHAPES[args.shape]
    heads, groups, layers = (sizes[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))
    size = sizes["hidden_size"] // heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    context = ContextGroup(process_rank(), max(process_count(), 2))
    local, layout = split(pack([row(args.tokens, 0)]).trimmed(), context)
    tokens, shape = len(local.ids_T), AttentionShape(heads, groups, size, size**-0.5)
    q_tHE, own_t2GE, kv_T2GE = (
        torch.randn(count, columns, size, device=device, dtype=dtype, requires_grad=True)
        for count, columns in ((tokens, heads), (tokens, 2 * groups), (tokens * context.ranks, 2 * groups))
    )

    def chunks(function: Any) -> Tensor:
        return torch.cat([function(q_tHE[c.queries], kv_T2GE[c.keys], c, shape) for c in layout.chunks])

    ways = {"attention_s": (lambda: chunks(attend), [q_tHE, kv_T2GE])}
    if device.type == "cuda":
        ways["flash_attention_2_s"] = (lambda: chunks(FlashChunk.apply), [q_tHE, kv_T2GE])
    if process_count() > 1:
        ways["gathers_s"] = (lambda: GatherTokens.apply(own_t2GE, context), [own_t2GE])
    seconds, gradients = {}, {}
    for name, (way, inputs) in ways.items():
        started = time.perf_counter()
        seconds[name], gradients[name] = recomputed(way, inputs, device)
        if process_rank() == 0:
            print(
                f"attention: {name} {seconds[name]:.3f} a layer, {time.perf_counter() - started:.1f} s in all",
                flush=True,
            )
    result = dict(what="attention", tokens=args.tokens, layers=layers) | {
        name: round(layers * max(from_all(value)), 3) for name, value in seconds.items()
    }
    if device.type == "cuda":
        ours, theirs = gradients["attention_s"], gradients["flash_attention_2_s"]
        result["relative_difference_of_gradients"] = [
            float(f"{float((a.float() - b.float()).norm() / b.float().norm()):.2e}")
            for a, b in zip(ours, theirs, strict=True)
        ]
    return result


def recomputed(
    forward: Callable[[], Tensor], inputs: list[Tensor], device: torch.device
) -> tuple[float, tuple[Tensor, ...]]:
    """Seconds of two forward passes and a backward pass, the second time, and the gradients."""
    for _ in range(2):
        synchronize(device)
        from_all(None)
        start = time.perf_counter()
        with torch.no_grad():
            forward()
        out = forward()
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        synchronize(device)
    return time.perf_counter() - start, gradients


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


PARTS = {"gradients": compare, "steps": long_steps, "attention": attention_alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--gpus", type=int, default=None, help="all of this machine without it")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--compared", type=int, default=6144, help="tokens of the row that one card trains on, too")
    parser.add_argument("--layers", type=int, default=4, help="of the model that gradients are compared on")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, to try this script with --shape tiny")
    args = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        count = args.gpus or torch.cuda.device_count()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode)
    with joined_processes():
        device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
        try:
            for part in args.parts:
                started = time.perf_counter()
                result = PARTS[part](args, device)
                if process_rank() == 0:
                    print(
                        "RESULT " + json.dumps(result | {"seconds": round(time.perf_counter() - started, 1)}),
                        flush=True,
                    )
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                from_main(None)
        except Exception:  # before the launcher ends this process because another one has ended
            traceback.print_exc()
            raise


if __name__ == "__main__":
    main()
