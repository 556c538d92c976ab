"""Seconds of a training step: from an earlier run where there is one, else from arithmetic.

Arithmetic: 2 operations a weight and token forward, as many for the gradient of the input, once more for what is
recomputed, and as many again for the gradient of a trained weight; attention's own products; divided by a share of the
device's peak. The shares are of this project's measurements (docs/performance.md); a pass takes no less than its
launches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parley.config import RunConfig
from parley.errors import ParleyError
from parley.safe_yaml import read_yaml_file
from parley.text import one_line

# Dense peak of 16-bit tensor cores in FLOP/s, and bandwidth of memory in bytes/s, as the makers' data sheets have them.
DEVICES = {
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "H20": (148e12, 4.0e12),
    "A100": (312e12, 2.0e12),
    "L40": (181e12, 0.86e12),
    "L4": (121e12, 0.3e12),
    "A10": (125e12, 0.6e12),
    "RTX 5090": (210e12, 1.79e12),
    "RTX 4090": (165e12, 1.01e12),
    "RTX 3090": (71e12, 0.94e12),
    "T4": (65e12, 0.32e12),
    "V100": (125e12, 0.9e12),
}
UNKNOWN_GPU = "A100"  # assumed for a GPU that is given by its memory alone
CPU_PEAK = (100e9, 20e9)  # a core's worth is measured in neither; two cores of 2025
EFFICIENCY = {"fused": 0.45, "captured": 0.35, "plain": 0.3}
LAYER_SECONDS = {
    "fused": 0.25e-3,
    "captured": 0.5e-3,
    "plain": 8e-3,
}  # the least for a layer's launches, forward and backward
MOST_RUNS = 200  # folders that are looked into


@dataclass(frozen=True)
class Work:
    """What a step computes. `matrix_weights`: weights of the layers' matrices; `trained_weights`: those with a gradient
    of their own."""

    matrix_weights: int
    trained_weights: int
    head_weights: int
    layers: int
    query_columns: int
    weight_bytes: int


def step_seconds(
    work: Work, length_N: NDArray[np.integer], rows: int, path: str, passes: float, recompute: float, device: str
) -> float:
    """Seconds of a step of `rows` rows, by arithmetic."""
    tokens = float(length_N.mean()) * rows
    # A causal query sees half of its document; scores and values are two products, each 2 operations.
    attention = 2 * work.layers * work.query_columns * float((length_N.astype(np.float64) ** 2).mean()) * rows
    forward = 2 * work.matrix_weights * tokens + attention
    gradient_of_weights = 2 * work.trained_weights * tokens
    head = 3 * 2 * work.head_weights * tokens
    flops = forward * (2 + recompute) + attention * 0.5 + gradient_of_weights + head
    peak, bandwidth = peaks(device)
    computed = flops / (EFFICIENCY[path] * peak)
    moved = passes * (2 + recompute) * work.weight_bytes / bandwidth
    return max(computed + moved, passes * work.layers * LAYER_SECONDS[path])


def peaks(device: str) -> tuple[float, float]:
    """FLOP/s and bytes/s of the device called `device`."""
    for name, values in DEVICES.items():
        if name in device:
            return values
    return DEVICES[UNKNOWN_GPU] if "GPU" in device or "NVIDIA" in device else CPU_PEAK


def earlier_rate(config: RunConfig, device: str) -> tuple[float, Path] | None:
    """Tokens per second of the newest finished run beside `config.output` that trained the same model on `device`."""
    newest: tuple[float, float, Path] | None = None
    parent = config.output.parent
    for folder in list(parent.iterdir())[:MOST_RUNS] if parent.is_dir() else []:
        rate = _rate(folder, config, device)
        if rate is not None:
            when = (folder / "report.json").stat().st_mtime
            newest = max(newest or (0.0, 0.0, folder), (when, rate, folder))
    return None if newest is None else (newest[1], newest[2])


def _rate(folder: Path, config: RunConfig, device: str) -> float | None:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        settings = RunConfig.create(read_yaml_file(folder / "run.yaml"))
        used = report["resources"]
        rate, name = float(used["tokens_per_s"]), used["device"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, ParleyError):
        return None  # no run, or not one that this version wrote
    same = (
        name == device
        and Path(settings.model.name).name == Path(config.model.name).name
        and settings.model.quantization == config.model.quantization
        and (settings.lora is None) == (config.lora is None)
        and _training(settings) == _training(config)
    )
    return rate if same and 0 < rate < 1e12 else None


def _training(config: RunConfig) -> tuple[Any, ...]:
    training = config.training
    return training.engine, training.memory, training.gradient_checkpointing


def describe_basis(rate: tuple[float, Path] | None, device: str) -> str:
    """Where the time comes from, for the table."""
    if rate is not None:
        return f"from {rate[0]:,.0f} tokens/s of the run {one_line(str(rate[1]), 80)}"
    known = any(name in device for name in DEVICES)
    assumed = "" if known or "GPU" not in device else f", assuming an {UNKNOWN_GPU}"
    return f"from arithmetic (operations and bandwidth of the device{assumed}): within a factor of two"


def model_work(model: torch.nn.Module, config: Any) -> Work:
    """Of a model on the meta device. Of a mixture of experts, the experts that a token takes."""
    text = config.get_text_config()
    matrices, experts = 0, 0
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = {id(p) for module in (embedding, head) if module is not None for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in outside or parameter.dim() < 2 or "lora_" in name:
            continue
        numel = parameter.quant_state.shape.numel() if parameter.dtype == torch.uint8 else parameter.numel()
        matrices += 0 if "experts" in name else numel
        experts += numel if "experts" in name else 0
    values = text.to_dict()
    total = values.get("num_local_experts") or values.get("num_experts") or 0
    share = (values.get("num_experts_per_tok") or total) / total if total else 0.0
    heads = values.get("num_attention_heads") or 1
    size = values.get("head_dim") or (values.get("hidden_size") or 0) // heads
    return Work(
        matrix_weights=matrices + int(experts * share),
        trained_weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head_weights=head.weight.numel() if head is not None else 0,
        layers=values.get("num_hidden_layers") or 1,
        query_columns=heads * size,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
    )
