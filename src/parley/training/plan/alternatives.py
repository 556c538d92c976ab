"""Changes of settings that a run fits with where it does not fit as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parley.config import RunConfig
from parley.errors import ModelError, UsageError
from parley.training.plan.device import PlanDevice
from parley.training.plan.planner import Data, Planner
from parley.training.shard_decision import context_obstacle


@dataclass(frozen=True)
class Alternative:
    """A change of settings, and the peak of the run with it."""

    settings: str
    peak_bytes: int
    fits: bool


def alternatives(config: RunConfig, data: Data, device: PlanDevice) -> Iterator[Alternative]:
    """Changes of settings, from the least to the most, with their peaks; it ends with the first pair that fits."""
    changes: list[list[str]] = []
    single = [change for change in _single_changes(config, data, device.count) if change]
    changes += [[change] for change in single]
    accumulated: list[str] = []
    for change in single:
        accumulated = [*accumulated, change]
        if len(accumulated) > 1:
            changes.append(accumulated)
    any_fits = False
    for settings in changes:
        if len(settings) > 1 and any_fits:
            return
        alternative = _alternative(config, data, device, settings)
        if alternative is not None:
            any_fits = any_fits or alternative.fits
            if alternative.fits or len(settings) == 1 or settings == changes[-1]:
                yield alternative


def _single_changes(config: RunConfig, data: Data, gpus: int) -> Iterator[str]:
    training = config.training
    if training.engine == "plain":
        yield "training.engine=auto"
    if not training.gradient_checkpointing:
        yield "training.gradient_checkpointing=true"
    if training.memory != "low" and training.engine == "auto":
        yield "training.memory=low"
    if gpus > 1 and training.shard == "none":
        yield "training.shard=full"
    if gpus > 1 and training.context_parallel == 1 and context_obstacle(config) is None:
        yield f"training.context_parallel={gpus}"
    if config.model.quantization in ("auto", "none") and config.lora is not None:
        yield "model.quantization=nf4"
    if training.per_device_train_batch_size > 1:
        yield "training.per_device_train_batch_size=1"
    longest = int(data.length_N.max())
    if longest > 16:
        yield f"model.max_seq_length={max(longest // 2, 8)}"
    if config.lora is None:
        yield "lora={}"


def _alternative(config: RunConfig, data: Data, device: PlanDevice, settings: list[str]) -> Alternative | None:
    values = config.model_dump(mode="json")
    batch = config.training.per_device_train_batch_size
    overrides = list(settings)
    if any("per_device_train_batch_size" in change for change in settings):  # the same rows a step
        overrides.append(f"training.gradient_accumulation_steps={batch * config.training.gradient_accumulation_steps}")
    try:
        changed = RunConfig.create(values, overrides)
        length_N = np.minimum(data.length_N, changed.model.max_seq_length)
        estimate = Planner(changed, Data(length_N, data.rows), device).taken()
    except (UsageError, ModelError):  # a change that this model cannot follow, such as a saved quantization
        return None
    return Alternative(" ".join(f"--set {change}" for change in overrides), estimate.peak_bytes, estimate.fits(device))
