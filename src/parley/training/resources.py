"""Time and memory of a run, for the progress line and the report. Memory is in GiB."""

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
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def memory_total(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return psutil.virtual_memory().total / GIB


def memory_now(device: torch.device) -> float:
    """What PyTorch holds on a GPU; what the process holds on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def give_back_memory(device: torch.device) -> None:
    """Return to a GPU what PyTorch holds for nobody, so that it does not count for what comes next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_peak(device: torch.device) -> float:
    """The largest `memory_now` since the start of the process, or on a GPU since `Meter` began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Stages:
    """Seconds of each stage of a run, in their order; each ends where the next begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def end(self, name: str) -> None:
        now = perf_counter()
        self.seconds[name], self._last = now - self._last, now


@dataclass
class Meter:
    """Notes memory when made, and the time from then on."""

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
