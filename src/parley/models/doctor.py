"""What this machine can do for a run, and what to change where it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from parley.errors import one_line
from parley.models.device import GIB, has_bf16, pick_device

DISTRIBUTION = "parley-llm"
State = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `advice` says what to change where `state` is not good."""

    name: str
    value: str
    state: State = "good"
    advice: str | None = None


def examine() -> list[Finding]:
    """Look at Python, packages, GPU, bitsandbytes, CPU, disk and the hub's settings. Never raises ParleyError."""
    return [*_versions(), *_gpu(), *_bitsandbytes(), *_host(), *_hub()]


def _versions() -> Iterator[Finding]:
    """Versions against the ranges that parley-llm's own metadata asks for."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "imported, but not installed", "note", "pip install it, so that versions are checked"
        )
        return
    yield _version("Python", platform.python_version(), SpecifierSet(about["Requires-Python"]))
    for line in metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding(wanted.name, "missing", "bad", f"pip install '{wanted}'")
            continue
        yield _version(wanted.name, found, wanted.specifier)


def _version(name: str, found: str, wanted: SpecifierSet) -> Finding:
    if wanted.contains(found, prereleases=True):
        return Finding(name, found)
    remedy = f"use Python {wanted}" if name == "Python" else f"pip install '{name}{wanted}'"
    return Finding(name, f"{found}, tested with {wanted}", "note", remedy)


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        advice = (
            f"install a driver for CUDA {built}, or check that nvidia-smi shows the GPU"
            if built
            else "with a GPU here, install torch from https://pytorch.org with CUDA; without one, small models only"
        )
        yield Finding("GPU", "none; runs go to the CPU", "note", advice)
        return
    device = pick_device("cuda")
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    yield Finding("GPU", f"{torch.cuda.device_count()} x {properties.name}, compute capability {capability}")
    yield Finding("CUDA", f"{torch.version.cuda or torch.version.hip} in torch, driver {_driver()}")
    free, total = torch.cuda.mem_get_info(device)
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < total / 2:
        yield Finding("GPU memory", value, "note", "end other programs that use the GPU (nvidia-smi lists them)")
    else:
        yield Finding("GPU memory", value)
    if has_bf16():
        yield Finding("bf16", "yes")
    else:
        yield Finding("bf16", "no; runs use fp16", "note", "nothing to do: model.dtype auto picks float16")


def _driver() -> str:
    """The NVIDIA driver's version; torch does not tell it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip().partition("\n")[0]


def _bitsandbytes() -> Iterator[Finding]:
    """Really quantise a matrix and take an optimizer step: a package that imports may still lack its kernels."""
    device = pick_device()
    for name, attempt, lost in [
        ("NF4 weights", _four_bit_error, "model.quantization: none"),
        ("8-bit AdamW", _eight_bit_step, "training.optim: adamw_torch_fused"),
    ]:
        try:
            value = attempt(device)
        except (ImportError, OSError, RuntimeError, NotImplementedError, AttributeError) as error:
            yield Finding(
                name, f"fails on {device.type}: {one_line(error)}", "bad", f"reinstall bitsandbytes, or set {lost}"
            )
            continue
        yield value


def _four_bit_error(device: torch.device) -> Finding:
    from bitsandbytes import functional

    weight_OI = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)
    packed, state = functional.quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=True)
    error = (functional.dequantize_4bit(packed, state) - weight_OI).abs().max().item()
    if error > 0.2:  # half of NF4's widest gap is 0.15
        return Finding("NF4 weights", f"wrong by {error:.2f} on {device.type}", "bad", "reinstall bitsandbytes")
    return Finding("NF4 weights", f"work on {device.type}")


def _eight_bit_step(device: torch.device) -> Finding:
    from bitsandbytes.optim import AdamW8bit

    weight = torch.nn.Parameter(torch.ones(8192, device=device))  # smaller tensors keep 32-bit state
    weight.grad = torch.ones_like(weight)
    AdamW8bit([weight], lr=0.1, weight_decay=0).step()
    step = 1 - weight.detach().mean().item()
    if not 0.05 < step < 0.15:  # Adam's first step is the learning rate
        return Finding("8-bit AdamW", f"stepped {step:.3f} for 0.100 on {device.type}", "bad", "reinstall bitsandbytes")
    return Finding("8-bit AdamW", f"works on {device.type}")


def _host() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("CPU", f"{os.cpu_count()} cores, {platform.machine()}")
    value = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 4 * GIB:
        yield Finding("memory", value, "note", "end other programs, or choose a model under 1 B parameters")
    else:
        yield Finding("memory", value)
    yield _disk("disk here", Path.cwd())


def _disk(name: str, folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if free < 10:
        return Finding(name, f"{free:.1f} GiB free", "note", "free 10 GiB: an 8 B model in 16 bits alone takes 16")
    return Finding(name, f"{free:.1f} GiB free")


def _hub() -> Iterator[Finding]:
    cache = Path(constants.HF_HUB_CACHE)
    yield Finding("hub cache", f"{cache} ({'there' if cache.is_dir() else 'made when first needed'})")
    yield _disk("disk of the hub cache", cache)
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "offline (HF_HUB_OFFLINE)", "note", "unset HF_HUB_OFFLINE to download models and data")
    else:
        yield Finding("hub", f"downloads from {constants.ENDPOINT}")
