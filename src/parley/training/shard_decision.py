"""Whether a run cuts its weights (training.shard) or rows (training.context_parallel) over the processes.

Both take passes that several processes run together, and refuse what such a pass does not know.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from parley.config import RunConfig
from parley.errors import UsageError
from parley.training.plan.device import PlanDevice, planned_device
from parley.training.plan.memory import base_and_trained_bytes
from parley.training.processes import from_main, is_main_process, process_count

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
    # On a CPU all processes share the memory that whole models would take.
    on_gpus = config.model.device != "cpu" and torch.cuda.is_available()
    if process_count() == 1 or not on_gpus or _obstacle(config) is not None:
        return False
    device = replace(planned_device(torch.device("cuda"), None), count=process_count())
    return from_main(is_main_process() and needs_sharding(config, device))  # free memory may differ


def needs_sharding(config: RunConfig, device: PlanDevice) -> bool:
    """Whether a run on several of `device` fits with sharded weights, and not with whole ones, by its plan.

    The data are read only where the weights alone take half of the memory.
    """
    # The plan builds a run's arguments, which ask here for the optimizer.
    from parley.training.plan.run_plan import Data, Planner, read_data

    longest = Data(np.array([config.model.max_seq_length]), None)
    if base_and_trained_bytes(Planner(config, longest, device).model) < device.free_bytes / 2:
        return False
    return Planner(config, read_data(config), device).estimates_by_sharding()[0].memory == "sharded"


def check_context_parallel(config: RunConfig) -> None:
    """Raises UsageError where `training.context_parallel` cannot be followed."""
    training = config.training
    ranks = training.context_parallel
    if ranks == 1:
        return
    if process_count() % ranks:
        raise UsageError(
            f"training.context_parallel is {ranks} and there {'is' if process_count() == 1 else 'are'} "
            f"{process_count()} process{'' if process_count() == 1 else 'es'}: their number has to be a multiple of it"
        )
    for unsupported, setting in (
        (training.method != "sft", f"training.method: {training.method}"),
        (training.engine == "plain", "training.engine: plain"),
    ):
        if unsupported:
            raise UsageError(
                f"training.context_parallel: {ranks} and {setting} do not go together; leave one of them out"
            )


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
