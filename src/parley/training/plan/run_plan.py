"""The plan of a run: what it takes of memory, time and disk, and what would fit where it does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from parley.config import RunConfig
from parley.data.prepare import prepare
from parley.errors import UsageError
from parley.models.device import pick_device
from parley.models.load import load_tokenizer
from parley.training.plan.alternatives import Alternative, alternatives
from parley.training.plan.device import PlanDevice, parse_memory, planned_device
from parley.training.plan.memory import (
    MemoryEstimate,
)
from parley.training.plan.planner import Data, Planner
from parley.training.plan.several_gpus import LinkCost, check_gpus
from parley.training.shard_decision import context_obstacle


@dataclass(frozen=True)
class RunPlan:
    """Sizes in bytes, time in seconds. `estimates`: the path that the run takes first, then the others."""

    model: str
    parameters: int
    trained_parameters: int
    device: str
    device_bytes: int
    free_bytes: int
    not_fused_because: str | None
    estimates: list[MemoryEstimate]
    rows: int | None
    longest_row: int
    steps: int
    tokens: int
    seconds: float
    time_basis: str
    disk: dict[str, int]
    alternatives: list[Alternative] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gpus: int = 1
    step_seconds: float = 0.0
    link: LinkCost | None = None

    @property
    def peak_bytes(self) -> int:
        return self.estimates[0].peak_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.free_bytes

    def to_json(self) -> dict[str, Any]:
        estimates = [asdict(estimate) | {"peak_bytes": estimate.peak_bytes} for estimate in self.estimates]
        return asdict(self) | {"estimates": estimates, "peak_bytes": self.peak_bytes, "fits": self.fits}


def plan(config: RunConfig, *, gpu_memory: str | int | None = None, gpus: int = 1) -> RunPlan:
    """What a run of `config` takes, without loading weights or writing anything. The data is read and rendered.

    Args:
        gpu_memory: of a GPU that is not here, as a text such as "24GiB" or in bytes; without it the plan is for the
            device that the run would use.
        gpus: how many of them train together. Sizes are those of one.

    Raises UsageError, DataError, ModelError or DeviceError, as the run itself would.
    """
    config = config.model_copy(deep=True)
    check_planned(config)
    gpu_bytes = parse_memory(gpu_memory) if isinstance(gpu_memory, str) else gpu_memory
    here = torch.device("cpu") if gpu_bytes is not None else pick_device(config.model.device)
    check_gpus(gpus, config.training.context_parallel)
    device = replace(planned_device(here, gpu_bytes), count=gpus)
    data = read_data(config)
    config.training.context_parallel = context_ranks(config, data, device) or 1
    return plan_for(config, data, device)


def context_ranks(config: RunConfig, data: Data, device: PlanDevice, most: int | None = None) -> int | None:
    """training.context_parallel as a number. Of auto: the fewest GPUs that the largest pass fits on; None where it fits
    on no number of them, up to `most`.
    """
    wanted = config.training.context_parallel
    if wanted != "auto":
        return wanted
    if device.count == 1 or context_obstacle(config) is not None:
        return 1
    for ranks in range(1, (most or device.count) + 1):
        if device.count % ranks == 0 and _with_ranks(config, data, device, ranks).taken().fits(device):
            return ranks
    return None


def _with_ranks(config: RunConfig, data: Data, device: PlanDevice, ranks: int) -> Planner:
    training = config.training.model_copy(update={"context_parallel": ranks})
    return Planner(config.model_copy(update={"training": training}), data, device)


def check_planned(config: RunConfig) -> None:
    """Raises UsageError for a method that is not planned."""
    if config.training.method != "sft":
        raise UsageError(
            f"parley plan counts supervised steps; training.method: {config.training.method} is not planned: leave "
            "it out for a lower bound"
        )


def plan_for(config: RunConfig, data: Data, device: PlanDevice) -> RunPlan:
    """The plan for rows of these lengths on `device`."""
    planner = Planner(config, data, device)
    estimates = planner.estimates()
    taken = estimates[0]
    steps, tokens = planner.steps, planner.tokens
    seconds, basis = planner.time(taken)
    changes = [] if taken.fits(device) else list(alternatives(config, data, device))
    return RunPlan(
        model=config.model.name,
        parameters=planner.parameters,
        trained_parameters=planner.trained,
        device=device.name,
        device_bytes=device.total_bytes,
        free_bytes=device.free_bytes,
        not_fused_because=planner.not_fused_because,
        estimates=estimates,
        rows=data.rows,
        longest_row=int(data.length_N.max()),
        steps=steps,
        tokens=tokens,
        seconds=seconds,
        time_basis=basis,
        disk=planner.disk(),
        alternatives=changes,
        notes=list(dict.fromkeys(planner.notes)),
        gpus=device.count,
        step_seconds=seconds / max(steps, 1),
        link=planner.link(taken),
    )


def read_data(config: RunConfig) -> Data:
    """The lengths of the rows that a run of `config` trains on, rendered as it would. Raises DataError, ModelError."""
    tokenizer = load_tokenizer(config.model)
    prepared = prepare(config.data, tokenizer, config.model.max_seq_length)
    if prepared.summary.streaming:
        return Data(np.array([config.model.max_seq_length]), None)
    chunks = prepared.train.data.column("input_ids").chunks
    return Data(np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]), len(prepared.train))
