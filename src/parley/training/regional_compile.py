"""The plain path on a GPU with its decoder layers compiled: for families and options the fast step does not know."""

from __future__ import annotations

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

WORTH_IT = 300  # steps from which on compiling (a quarter of a minute) is won back


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> int:
    """Compile the decoder layers of a transformers model in place, for rows of any length; how many they are.

    All layers share one compilation, which happens at their first step (regional compilation:
    docs.pytorch.org/tutorials/recipes/regional_compilation.html).
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)
