"""Compiled decoder layers: the plain path on a GPU, for families and options that the fused step does not support."""

from __future__ import annotations

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

MIN_STEPS = 300
"""Compiling takes a quarter of a minute; shorter runs do not win it back."""


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> int:
    """Compile the decoder layers of a transformers model in place, for rows of any length. Returns their number.

    All layers share one compilation, which happens at their first step (regional compilation:
    docs.pytorch.org/tutorials/recipes/regional_compilation.html).
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
