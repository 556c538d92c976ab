"""What several GPUs change in a plan: the share of each, and what they send each other in a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from parley.errors import UsageError
from parley.training.plan.memory import Batches

# Bytes/s that a GPU sends, by the makers' data sheets: NVLink of the SXM boards, and PCIe 4.0 with 16 lanes for others.
NVLINK = {"B200": 900e9, "H200": 450e9, "H100": 450e9, "H20": 450e9, "A100": 300e9}
PCIE = 32e9
LINK_EFFICIENCY = 0.7  # of large messages through NCCL


@dataclass(frozen=True)
class LinkCost:
    """What a GPU sends in a step, in bytes, and the seconds that takes over `link` where nothing hides it."""

    link: str
    bytes_a_step: int
    seconds_a_step: float


def check_gpus(gpus: int, context_parallel: int | Literal["auto"]) -> None:
    """Raises UsageError for a number of GPUs that a run of these settings does not take."""
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: wanted a number of GPUs from 1 on")
    if context_parallel != "auto" and gpus % context_parallel:
        raise UsageError(
            f"training.context_parallel is {context_parallel} and there are {gpus} GPUs: their number has to be a "
            "multiple of it"
        )


def share_of(batches: Batches, gpus: int, context_parallel: int) -> Batches:
    """The rows of one GPU, or its part of them where several split each row."""
    if gpus == 1:
        return batches
    rows = -(-batches.rows_per_step * context_parallel // gpus)
    batch_size = min(batches.batch_size, rows)
    return replace(
        batches,
        length_N=np.ceil(batches.length_N / context_parallel).astype(int),
        batch_size=batch_size,
        accumulation=-(-rows // batch_size),
    )


def link_cost(device: str, gpus: int, *, gradient_bytes: int, gathered_bytes: int, context_bytes: int) -> LinkCost:
    """Of a step.

    Args:
        gradient_bytes: the gradient that is summed over all GPUs: a ring's all-reduce sends it almost twice.
        gathered_bytes: whole weights that are gathered, in all passes of the step.
        context_bytes: keys and values, and their gradients, of the tokens that a GPU holds of split rows.
    """
    name, rate = next((("NVLink", rate) for name, rate in NVLINK.items() if name in device), ("PCIe", PCIE))
    share = (gpus - 1) / gpus
    sent = int(2 * share * gradient_bytes + share * gathered_bytes + context_bytes)
    return LinkCost(name, sent, sent / (LINK_EFFICIENCY * rate))
