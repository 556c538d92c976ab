"""Checks of this machine: versions, GPU, bitsandbytes, memory, disk and hub, each with advice where one fails."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
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
from parley.library_compat import flash_attn
from parley.models.device import has_bf16, pick_device
from parley.units import GIB

DISTRIBUTION = "parley-llm"
State = Literal["good", "note", "bad"]
LINKS = {
    "PIX": "PCIe (one bridge)", "PXB": "PCIe (several bridges)", "PHB": "PCIe through the CPU",
    "NODE": "PCIe through the CPU", "SYS": "PCIe between two CPUs",
}  # fmt: skip
"""In the words of nvidia-smi's own legend."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `advice` says what to change where `state` is not good."""

    name: str
    value: str
    state: State = "good"
    advice: str | None = None


def diagnose() -> list[Finding]:
    """Check Python, packages, GPU, bitsandbytes, CPU, disk and the hub's settings. Never raises ParleyError."""
    return [*_versions(), *_gpu(), *_links(), *_bitsandbytes(), *_host(), *_hub()]


def _versions() -> Iterator[Finding]:
    """Installed versions against the ranges in the metadata of parley-llm."""
    try:
        project = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "imported, but not installed", "note", "pip install it, so that versions are checked"
        )
        return
    yield _version("Python", platform.python_version(), SpecifierSet(project["Requires-Python"]))
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        # Requirements of extras carry a marker that is false here: they may be missing.
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", "bad", f"pip install '{requirement}'")
            continue
        yield _version(requirement.name, found, requirement.specifier)


def _version(name: str, found: str, supported: SpecifierSet) -> Finding:
    if supported.contains(found, prereleases=True):
        return Finding(name, found)
    remedy = f"use Python {supported}" if name == "Python" else f"pip install '{name}{supported}'"
    return Finding(name, f"{found}, tested with {supported}", "note", remedy)


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
    cards = Counter(map(_card, range(torch.cuda.device_count())))
    yield Finding("GPU", ", ".join(f"{count} x {card}" for card, count in cards.items()))
    yield Finding("CUDA", f"{torch.version.cuda or torch.version.hip} in torch, driver {_driver()}")
    yield _gpu_memory()
    if has_bf16():
        yield Finding("bf16", "yes")
    else:
        yield Finding("bf16", "no; runs use fp16", "note", "nothing to do: model.dtype auto picks float16")
    yield from _long_attention(device)


def _long_attention(device: torch.device) -> Iterator[Finding]:
    """What attends to long conversations on a Hopper GPU; elsewhere there is no choice."""
    if torch.cuda.get_device_capability(device) != flash_attn.HOPPER:
        return
    version, name = flash_attn.installed_version(), "attention to long conversations"
    if flash_attn.usable(device):
        yield Finding(name, f"flash-attn-4 {version}")
        return
    found = (
        "cuDNN" if version is None else f"cuDNN; flash-attn-4 {version}, tested with {flash_attn.TESTED_VERSIONS[-1]}"
    )
    yield Finding(name, found, "note", "pip install 'parley-llm[hopper]' for flash-attn-4, which is faster")


def _card(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


def _gpu_memory() -> Finding:
    """Of the GPU with the least free memory: each process of a run takes as much of its own."""
    memory = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    index = min(range(len(memory)), key=lambda index: memory[index][0])
    free, total = memory[index]
    which = f" on GPU {index}, which has the least" if len(memory) > 1 else ""
    value = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{which}"
    if free < total / 2:
        return Finding("GPU memory", value, "note", "end other programs that use the GPU (nvidia-smi lists them)")
    return Finding("GPU memory", value)


def _driver() -> str:
    """The NVIDIA driver's version, which torch does not expose."""
    return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").strip().partition("\n")[0] or "unknown"


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; nothing where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        completed = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return completed.stdout


def _links() -> Iterator[Finding]:
    """How the GPUs of this machine reach each other, which bounds what several of them gain."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        yield Finding("GPU links", "one GPU" if count else "no GPU; several processes exchange through gloo on the CPU")
        return
    kinds = link_kinds(_nvidia_smi("topo", "-m"))
    if not kinds:
        pairs = list(itertools.combinations(range(count), 2))
        direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        value = f"memory of each other reached by {direct} of {len(pairs)} pairs; NVLink or PCIe is unknown"
        yield Finding("GPU links", value, "note", "nvidia-smi topo -m, which names the links, says nothing here")
        return
    value = ", ".join(f"{kind} between {pairs} of {sum(kinds.values())} pairs" for kind, pairs in kinds.items())
    if all(kind.startswith("NVLink") for kind in kinds):
        yield Finding("GPU links", value)
    else:
        advice = (
            "training.shard: full and training.context_parallel send much: parley plan --gpus N says how long it takes"
        )
        yield Finding("GPU links", value, "note", advice)


def link_kinds(topology: str) -> dict[str, int]:
    """Pairs of GPUs by their link, from the matrix that `nvidia-smi topo -m` prints."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    matrix = [row[1:] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    kinds: Counter[str] = Counter()
    for i, row in enumerate(matrix):
        for link in row[i + 1 : len(matrix)]:
            kinds[f"NVLink ({link})" if link.startswith("NV") else LINKS.get(link, link)] += 1
    return dict(kinds)


def _bitsandbytes() -> Iterator[Finding]:
    """Quantise a matrix and take an optimizer step: a package that imports may still lack its native kernels."""
    device = pick_device()
    for name, check, fallback in [
        ("NF4 weights", _check_nf4, "model.quantization: none"),
        ("8-bit AdamW", _check_adamw_8bit, "training.optim: adamw_torch_fused"),
    ]:
        try:
            finding = check(device)
        except (ImportError, OSError, RuntimeError, NotImplementedError, AttributeError) as error:
            yield Finding(
                name, f"fails on {device.type}: {one_line(error)}", "bad", f"reinstall bitsandbytes, or set {fallback}"
            )
            continue
        yield finding


def _check_nf4(device: torch.device) -> Finding:
    from bitsandbytes import functional

    weight_NK = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)
    packed, state = functional.quantize_4bit(weight_NK, quant_type="nf4", compress_statistics=True)
    error = (functional.dequantize_4bit(packed, state) - weight_NK).abs().max().item()
    if error > 0.2:  # half of NF4's widest gap is 0.15
        return Finding("NF4 weights", f"wrong by {error:.2f} on {device.type}", "bad", "reinstall bitsandbytes")
    return Finding("NF4 weights", f"work on {device.type}")


def _check_adamw_8bit(device: torch.device) -> Finding:
    from bitsandbytes.optim import AdamW8bit

    # An optimizer step on ones: the result is known, and a missing kernel shows as a wrong or absent update.
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
