"""Which implementation of the operations runs on a device."""

from __future__ import annotations

import torch

from parley.train_step import reference_ops
from parley.train_step.ops import Ops


def ops_for(device: torch.device) -> Ops:
    """The operations for `device`: Triton's on a GPU, PyTorch's elsewhere."""
    if device.type != "cuda":
        return reference_ops
    from parley.train_step import kernels  # Triton is installed only where a GPU is

    return kernels
