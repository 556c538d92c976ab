"""The device that a plan is for: the one here, or a GPU of which only the memory is known."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from parley.errors import UsageError
from parley.train_step.memory_plan import RESERVE
from parley.training.resource_usage import device_name
from parley.units import GIB

# Of a CUDA context with the kernels of PyTorch, cuBLAS, cuDNN and Triton that a step loads, outside the allocator:
# 0.67 to 0.77 GiB over eight configurations (benchmarks/plan_accuracy.py, H200, torch 2.11).
CONTEXT_BYTES = 760 * 2**20
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|M)?\s*", re.IGNORECASE)
UNITS = {"g": GIB, "gib": GIB, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanDevice:
    """Memory in bytes. `free_bytes`: what is left by other processes; `context_bytes`: what CUDA takes by itself;
    `host_bytes`: what offloaded activations may take of the host, which is assumed to have as much memory as a GPU that
    is not here.
    """

    name: str
    type: str
    total_bytes: int
    free_bytes: int
    context_bytes: int
    bf16: bool
    host_bytes: int
    count: int = 1  # such devices that train together

    @property
    def usable_bytes(self) -> int:
        """What a run may take in PyTorch's allocator with memory: auto."""
        return int(max(self.free_bytes - self.context_bytes, 0) * (1 - RESERVE))


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GiB or 80GB; a bare number is GiB. Raises UsageError."""
    match = SIZE.fullmatch(text)
    size = float(match[1]) * UNITS[(match[2] or "gib").lower()] if match else 0
    if not 0 < size < 2**50:
        raise UsageError(f"--gpu-memory: got {text!r}; wanted a size such as 24GiB or 80GB")
    return int(size)


def planned_device(device: torch.device, gpu_bytes: int | None) -> PlanDevice:
    """The device of a run here, or with `gpu_bytes` a GPU of so much memory with nothing else on it."""
    if gpu_bytes is not None:
        return PlanDevice(
            f"a GPU of {gpu_bytes / GIB:.1f} GiB", "cuda", gpu_bytes, gpu_bytes, CONTEXT_BYTES, True, gpu_bytes
        )
    memory = psutil.virtual_memory()
    host = int(memory.available * (1 - RESERVE))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # This process has a context of its own already, which is no longer part of what is free.
        free = min(free + torch.cuda.memory_reserved(device) + CONTEXT_BYTES, total)
        return PlanDevice(device_name(device), "cuda", total, free, CONTEXT_BYTES, torch.cuda.is_bf16_supported(), host)
    return PlanDevice(device_name(device), "cpu", memory.total, memory.available, 0, True, host)
