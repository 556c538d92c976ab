"""Peak memory of a run on each path of training, by what it is for.

The fused step's buffers are counted with the table that it allocates by (train_step/workspace.py), the plain path's on
fake tensors (plain_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from parley.data.packing import split_by_tokens
from parley.models.meta_model import base_bytes
from parley.models.packing_isolation import why_not_packed
from parley.train_step.bind import BoundModel
from parley.train_step.memory_plan import LIBRARY_BYTES, DeviceMemory, MemoryPlan, buffer_bytes, make_plan
from parley.training.captured_trainer import captured_pass_tokens
from parley.training.plan.cached_model import cached_pass_bytes
from parley.training.plan.device import PlanDevice
from parley.training.plan.plain_memory import PassShape

# What PyTorch's allocator holds beside tensors, in blocks that are split or rounded up: a share of the weights, which
# are loaded once, and of everything else. The fused step's workspace is allocated once, so that little is split: 1.4 to
# 2.2% (benchmarks/plan_accuracy.py, H200).
WEIGHT_SLACK = 0.005
SLACK = {"fused": 0.02, "captured": 0.1, "plain": 0.1}


@dataclass(frozen=True)
class Batches:
    """Rows of a run. `length_N`: tokens of each, or of the longest alone where the others are unknown."""

    length_N: NDArray[np.integer]
    batch_size: int
    accumulation: int
    max_length: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one path in bytes, by what it is for; `notes` say how the path carries a step out."""

    path: Literal["fused", "captured", "plain"]
    memory: str
    parts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    passes: float = 1.0  # of a step
    recompute: float = 0.0  # share of the forward pass that is computed twice

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def fits(self, device: PlanDevice) -> bool:
        return self.peak_bytes <= device.free_bytes


def fused_estimate(
    model: PeftModel,
    bound: BoundModel,
    memory: Literal["auto", "low"] | float,
    batches: Batches,
    state_bytes: float,
    device: PlanDevice,
) -> MemoryEstimate:
    """The plan that the fused step would make on `device`, and its memory."""
    weights, adapter = base_bytes(model), bound.flat.weight_Z.element_size() * _flat_numel(bound)
    target = torch.device(device.type)
    held = weights + 2 * adapter
    limits = DeviceMemory(target, device.usable_bytes, held, device.host_bytes)
    plan = make_plan(bound, memory, batches.length_N, batches.rows_per_step, state_bytes, limits)
    parts = {
        "base weights": weights,
        "adapter weights and gradients": 2 * adapter,
        **buffer_bytes(plan, bound, target, state_bytes),
    }
    tokens = min(float(batches.length_N.mean()) * batches.rows_per_step, plan.tokens)
    recompute = {"all": 0.0, "linear": 0.05, "attention": 0.7, "attention_offloaded": 0.7, "layer_inputs": 1.0}
    return MemoryEstimate(
        "fused",
        str(memory),
        _with_overheads(parts, "fused", device),
        _fused_notes(plan),
        passes=max(1.0, float(batches.length_N.mean()) * batches.rows_per_step / tokens),
        recompute=recompute[plan.saved],
    )


def captured_estimate(
    model: Any, batches: Batches, state_bytes: float, compute_dtype: torch.dtype | None, device: PlanDevice
) -> MemoryEstimate:
    """The largest pass of the captured path, which saves all activations and needs no attention mask."""
    tokens = captured_pass_tokens(int(batches.length_N.max()), batches.rows_per_step)
    in_all = float(batches.length_N.mean()) * batches.rows_per_step
    shape = PassShape(1, tokens, False, compute_dtype, False, accumulated=in_all > tokens)
    notes = [f"captured path: packed rows of up to {tokens:,} tokens; all activations saved"]
    parts = _autograd_parts(model, state_bytes, shape, device)
    return MemoryEstimate(
        "captured", "", _with_overheads(parts, "captured", device), notes, passes=max(1.0, in_all / tokens)
    )


def joint_estimate(
    model: Any, batches: Batches, state_bytes: float, compute_dtype: torch.dtype | None, checkpointing: bool,
    device: PlanDevice, parts_of_weights: int,
) -> MemoryEstimate:  # fmt: skip
    """The largest pass of a process whose passes are those of several: each holds a part of the weights, of each row,
    or of both. `batches` are the share of one process.

    All of them hold the whole adapter. Where all weights are trained, these, their gradients and moments are cut, too.
    """
    tokens = captured_pass_tokens(int(batches.length_N.max()), batches.rows_per_step)
    in_all = float(batches.length_N.mean()) * batches.rows_per_step
    shape = PassShape(1, tokens, False, compute_dtype, checkpointing, accumulated=in_all > tokens)
    parts = _autograd_parts(model, state_bytes, shape, device)
    if parts_of_weights > 1:
        cut = ["base weights"]
        if not isinstance(model, PeftModel):
            cut += ["trained weights", "optimizer state"]
            # Gradients are as large as the weights that they are of, and reduced and scattered layer by layer.
            gradients = parts["trained weights"]
            parts["gradients, activations and loss"] -= gradients - gradients // parts_of_weights
        parts |= {name: -(-parts[name] // parts_of_weights) for name in cut}
        parts["gathered weights"] = _gathered_bytes(model)
    recomputed = "activations recomputed layer by layer" if checkpointing else "all activations saved"
    cut_over = f"weights cut over {parts_of_weights} GPUs; " if parts_of_weights > 1 else ""
    notes = [f"captured path: {cut_over}up to {tokens:,} tokens of a packed row on each; {recomputed}"]
    return MemoryEstimate(
        "captured",
        "sharded" if parts_of_weights > 1 else "",
        _with_gather_slack(_with_overheads(parts, "captured", device)),
        notes,
        passes=max(1.0, in_all / tokens),
        recompute=float(checkpointing),
    )


def _with_gather_slack(parts: dict[str, int]) -> dict[str, int]:
    """Buffers of gathers leave as much again in the allocator: 4.7 GiB for the 70B shape on two H200."""
    if "allocator slack" in parts:
        parts["allocator slack"] += parts.get("gathered weights", 0)
    return parts


def base_and_trained_bytes(model: Any) -> int:
    """Of all weights that sharding cuts: without an adapter."""
    trained = 0 if isinstance(model, PeftModel) else sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return base_bytes(model) + trained


def _gathered_bytes(model: Any) -> int:
    """Weights that are whole at a time: a layer, and the next one, which arrives in one buffer and is copied out; or
    embedding or head by themselves, in the buffer and copied out.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    ends = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    full = not isinstance(model, PeftModel)

    def size(module: nn.Module) -> int:
        return base_bytes(module) + (sum(p.nbytes for p in module.parameters() if p.requires_grad) if full else 0)

    return max(3 * max(map(size, layers)), 2 * max(map(size, ends)))


def plain_estimate(
    model: Any, batches: Batches, state_bytes: float, compute_dtype: torch.dtype | None, checkpointing: bool,
    device: PlanDevice,
) -> MemoryEstimate:  # fmt: skip
    """The largest pass that the plain path may run on `device`."""
    runs, padded = plain_passes(model, batches)
    rows, length = max(runs, key=lambda run: run[0] * run[1])
    shape = PassShape(
        rows, length, padded or batches.rows_per_step > 1, compute_dtype, checkpointing, accumulated=len(runs) > 1
    )
    parts = _autograd_parts(model, state_bytes, shape, device)
    how = f"{rows} padded rows of {length:,} tokens" if padded else f"packed rows of up to {length:,} tokens"
    recomputed = "activations recomputed layer by layer" if checkpointing else "all activations saved"
    notes = [f"plain path: {how}; {recomputed}"]
    return MemoryEstimate(
        "plain", "", _with_overheads(parts, "plain", device), notes, passes=len(runs), recompute=float(checkpointing)
    )


def _autograd_parts(model: Any, state_bytes: float, shape: PassShape, device: PlanDevice) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "base weights": base_bytes(model),
        "trained weights": sum(parameter.nbytes for parameter in trained),
        "optimizer state": int(state_bytes * sum(parameter.numel() for parameter in trained)),
        "gradients, activations and loss": cached_pass_bytes(model, shape),
        "library buffers": LIBRARY_BYTES if device.type == "cuda" else 0,
    }


def plain_passes(model: Any, batches: Batches) -> tuple[list[tuple[int, int]], bool]:
    """(rows, tokens of a row) of each pass of a step of the longest rows, and whether rows are padded."""
    longest = np.sort(batches.length_N)[::-1][: batches.rows_per_step]
    if len(longest) < batches.rows_per_step:
        longest = np.sort(np.resize(longest, batches.rows_per_step))[::-1]  # repeated
    if why_not_packed(model, batches.max_length) is not None:
        starts = range(0, len(longest), batches.batch_size)
        return [(len(longest[i : i + batches.batch_size]), int(longest[i])) for i in starts], True
    lengths = [int(length) for length in longest]
    runs = split_by_tokens(lengths, batches.batch_size * batches.max_length)
    return [(1, sum(lengths[run])) for run in runs], False


def _with_overheads(parts: dict[str, int], path: str, device: PlanDevice) -> dict[str, int]:
    if device.type == "cuda":
        weights = parts["base weights"]
        parts["allocator slack"] = int(WEIGHT_SLACK * weights + SLACK[path] * (sum(parts.values()) - weights))
        parts["CUDA context"] = device.context_bytes
    return {name: size for name, size in parts.items() if size}


def _fused_notes(plan: MemoryPlan) -> list[str]:
    return plan.describe()[:1]


def _flat_numel(bound: BoundModel) -> int:
    """Adapter weights in the flat buffer, frozen ones and padding included."""
    return bound.flat.weights[0].untyped_storage().nbytes() // bound.flat.weights[0].element_size()
