"""Which device a run uses and in which floating-point type."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parley.errors import DeviceError
from parley.units import GIB

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(requested: str = "auto") -> torch.device:
    """The device for `model.device`: auto, cuda or cpu.

    "cuda" is the current GPU, so that each process of a torchrun uses its own. Raises DeviceError where a GPU is
    requested and there is none.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "finds no usable GPU" if torch.version.cuda or torch.version.hip else "is built without CUDA"
        raise DeviceError(
            f"model.device is cuda, but torch {torch.__version__} {reason}; this machine offers "
            f"{describe_device(torch.device('cpu'))}: set model.device: cpu, or see `parley doctor`"
        )
    return torch.device("cuda", torch.cuda.current_device())


def pick_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The type of weights and matrix products for `model.dtype`.

    auto is bf16 on GPUs that have it in hardware, fp16 on older ones, and fp32 on CPU, where 16-bit products are
    often the slower ones. Raises DeviceError for bf16 on a GPU without it.
    """
    if requested != "auto":
        dtype = DTYPES[requested]
        if dtype == torch.bfloat16 and device.type == "cuda" and not has_bf16():
            raise DeviceError(
                f"model.dtype is bfloat16, but {torch.cuda.get_device_name(device)} has no bf16 units; "
                "set model.dtype: float16, or auto"
            )
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def has_bf16() -> bool:
    """Whether the current GPU multiplies in bf16 without emulating it."""
    # Turing GPUs emulate bf16 through fp32: it works there, slower than fp16.
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def describe_device(device: torch.device) -> str:
    """Name and size of the device: "NVIDIA H200 with 139.8 GiB", "a CPU with 16 cores"."""
    if device.type == "cpu":
        return f"a CPU with {os.cpu_count()} cores"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} with {properties.total_memory / GIB:.1f} GiB"


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators with `seed` inside the block and restore their state after it."""
    # fork_rng copies the state of every GPU unless given a list, which takes a second on a machine with many.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
