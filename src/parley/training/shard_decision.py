"""Whether a run cuts its weights (training.shard) or rows (training.context_parallel) over the processes.

Both take passes that several processes run together, and refuse what such a pass does not know.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from parley.config import RunConfig
from parley.errors import UsageError
from parley.training.plan.device import PlanDevice, planned_device
from parley.training.plan.memory import base_and_trained_bytes
from parley.training.processes import from_main, is_main_process, process_count

if TYPE_CHECKING:
    from parley.training.plan.planner import Data

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Those that train sharded weights; an adapter takes any."""


def shards_weights(config: RunConfig) -> bool:
    """Whether weights are sharded in a run of these settings and of this many processes.

    Raises UsageError where `training.shard: full` cannot be followed.
    """
    training = config.training
    if training.shard == "none":
        return False
    if training.shard == "full":
        if process_count() == 1:
            raise UsageError("training.shard: full cuts weights over processes, and there is one; add --gpus N")
        if (obstacle := _obstacle(config)) is not None:
            raise UsageError(f"training.shard: full and {obstacle} do not go together; leave one of them out")
        return True
    device = _device(config)
    if device is None or _obstacle(config) is not None:
        return False
    config = with_context(config)
    return from_main(is_main_process() and needs_sharding(config, device))  # free memory may differ


def _device(config: RunConfig) -> PlanDevice | None:
    """The GPUs of a run of several processes; None elsewhere. On a CPU all share the memory of whole models."""
    if process_count() == 1 or config.model.device == "cpu" or not torch.cuda.is_available():
        return None
    return replace(planned_device(torch.device("cuda"), None), count=process_count())


def needs_sharding(config: RunConfig, device: PlanDevice) -> bool:
    """Whether a run on several of `device` fits with sharded weights, and not with whole ones, by its plan.

    The data are read only where the weights alone take half of the memory.
    """
    # The plan builds a run's arguments, which ask here for the optimizer.
    from parley.training.plan.planner import Planner
    from parley.training.plan.run_plan import read_data

    if base_and_trained_bytes(Planner(config, _longest(config), device).model) < device.free_bytes / 2:
        return False
    return Planner(config, read_data(config), device).taken().memory == "sharded"


def with_context(config: RunConfig) -> RunConfig:
    """`config` with the number of processes that split each row, which training.context_parallel says or leaves open.

    Raises UsageError where it cannot be followed.
    """
    if config.training.context_parallel == "auto":
        device = _device(config)
        ranks = 1 if device is None else from_main(needed_ranks(config, device) if is_main_process() else 1)
    else:
        ranks = _checked_ranks(config, config.training.context_parallel)
    return config.model_copy(update={"training": config.training.model_copy(update={"context_parallel": ranks})})


def needed_ranks(config: RunConfig, device: PlanDevice) -> int:
    """What auto is on several of `device`. The data are read only where rows of model.max_seq_length do not fit."""
    from parley.training.plan.run_plan import context_ranks, read_data

    if context_obstacle(config) is not None or context_ranks(config, _longest(config), device, most=1) == 1:
        return 1
    return context_ranks(config, read_data(config), device) or 1


def _longest(config: RunConfig) -> Data:
    from parley.training.plan.planner import Data

    return Data(np.array([config.model.max_seq_length]), None)


def _checked_ranks(config: RunConfig, ranks: int) -> int:
    if process_count() % ranks:
        raise UsageError(
            f"training.context_parallel is {ranks} and there {'is' if process_count() == 1 else 'are'} "
            f"{process_count()} process{'' if process_count() == 1 else 'es'}: their number has to be a multiple of it"
        )
    if ranks > 1 and (setting := context_obstacle(config)) is not None:
        raise UsageError(f"training.context_parallel: {ranks} and {setting} do not go together; leave one of them out")
    return ranks


def context_obstacle(config: RunConfig) -> str | None:
    """The first setting that split rows do not follow."""
    training = config.training
    for unsupported, setting in (
        (training.method != "sft", f"training.method: {training.method}"),
        (training.engine == "plain", "training.engine: plain"),
    ):
        if unsupported:
            return setting
    return None


def _obstacle(config: RunConfig) -> str | None:
    """The first setting that sharded weights do not follow."""
    training = config.training
    lora = config.lora.model_dump() if config.lora is not None else {}
    for unsupported, setting in (
        (training.method != "sft", f"training.method: {training.method}"),
        (training.engine == "plain", "training.engine: plain"),
        (config.lora is None and training.keeps_best, "training.keep: best with lora: null"),
        (
            config.lora is None and training.optim not in ("auto", *SHARDED_OPTIMIZERS),
            f"training.optim: {training.optim} with lora: null",
        ),
        (config.model.adapter == "continue", "model.adapter: continue"),
        (lora.get("use_dora"), "lora.use_dora"),
        (lora.get("loftq"), "lora.loftq"),
        (lora.get("modules_to_save"), "lora.modules_to_save"),
        (lora.get("trainable_token_indices"), "lora.trainable_token_indices"),
        (lora.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"), "lora.init_lora_weights"),
        (lora.get("bias", "none") != "none", "lora.bias"),
    ):
        if unsupported:
            return setting
    return None
