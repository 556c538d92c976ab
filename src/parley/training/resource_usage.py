"""Time and memory of a run, for the progress line and the report. Memory is in GiB, time in seconds."""

from __future__ import annotations

import platform
import resource
from dataclasses import dataclass, field
from time import perf_counter

import psutil
import torch

from parley.units import GIB


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def memory_total(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def memory_now(device: torch.device) -> float:
    """Memory reserved by PyTorch's allocator on a GPU; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def memory_peak(device: torch.device) -> float:
    """The maximum of `memory_now`: on a GPU since the last ResourceMeter was made, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def release_cached_memory(device: torch.device) -> None:
    """Return the allocator's unused blocks to the GPU, so that the next stage is not charged for them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class StageTimer:
    """Seconds of each stage of a run, in their order; each ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage_start = perf_counter()

    def end(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] = now - self._stage_start
        self._stage_start = now

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass
class ResourceMeter:
    """Memory in use at construction (`before`), and the seconds since then. Resets the GPU's peak."""

    device: torch.device
    before: float = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.before = memory_now(self.device)
        self.started = perf_counter()

    def seconds(self) -> float:
        return perf_counter() - self.started
