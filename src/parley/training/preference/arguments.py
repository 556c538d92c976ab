"""From a run's settings to TRL's DPOConfig, KTOConfig or GRPOConfig, and to the loss of training.method.

Every field of the three is reachable under its own name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from parley.config import RunConfig, TrainingSection
from parley.config_keys import unknown_key
from parley.errors import UsageError, one_line
from parley.training.arguments import ELSEWHERE, OWN, UNREAD, Secret, precision, save_steps
from parley.training.check_settings import check_types
from parley.training.preference.config import METHOD_DEFAULTS, DPOConfig, GRPOConfig, KTOConfig
from parley.training.preference.grpo_options import check_options
from parley.training.preference.losses import ORPO, Objective, SimPO, dpo_objective, kto_objective
from parley.training.preference.pair_options import WITHOUT_EFFECT
from parley.training.processes import process_count

OF_METHOD = {
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("simpo",),
    "loss_type": ("dpo", "kto", "grpo"),
    "loss_weights": ("dpo",),
}
"""Fields that only some methods read."""
KINDS: dict[str, type[DPOConfig] | type[KTOConfig] | type[GRPOConfig]] = {"kto": KTOConfig, "grpo": GRPOConfig}
MAX_COMPLETION = 512
"""Tokens of a sampled answer by default: TRL's, or half of model.max_seq_length where that is less."""


def preference_config(
    config: RunConfig, output_dir: Path, device: torch.device
) -> tuple[DPOConfig | KTOConfig | GRPOConfig, list[str]]:
    """The arguments to train with, and what was decided on the way in plain words. Raises UsageError in one line."""
    method, values = config.training.method, config.training.model_dump(exclude=OWN)
    kind = KINDS.get(method, DPOConfig)
    if (count := process_count()) > 1:
        raise UsageError(
            f"training.method: {method} trains in one process, and here are {count}: start it without --gpus, "
            "--processes and torchrun"
        )
    _check_names(method, kind, values)
    if method == "kto" and config.training.per_device_train_batch_size < 2 and values.get("loss_type", "kto") == "kto":
        raise UsageError(
            "training.per_device_train_batch_size: got 1; kto estimates the divergence from another row's answer; "
            "set 2 or more"
        )
    without_effect = UNREAD if method == "grpo" else WITHOUT_EFFECT | UNREAD
    notes = [f"training.{name} has no effect: {reason}" for name, reason in without_effect.items() if name in values]
    for name in without_effect.keys() - UNREAD.keys():
        values.pop(name, None)
    if values["optim"] == "auto":
        values["optim"] = "adamw_8bit" if device.type == "cuda" else "adamw_torch_fused"
    if values["save_steps"] == "auto":
        values["save_steps"] = save_steps(values)
        notes.append(f"checkpoints: every {values['save_steps']} steps, where that takes little of the time")
    if isinstance(values.get("loss_type"), str) and method == "dpo":
        values["loss_type"] = [values["loss_type"]]
    defaults: dict[str, Any] = {
        **METHOD_DEFAULTS[method],
        **precision(device, values),
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 2,
        **(_grpo_defaults(config) if method == "grpo" else {"max_length": config.model.max_seq_length}),
        "use_cpu": device.type == "cpu",
        "output_dir": str(output_dir),
        "eval_strategy": "no" if values["eval_steps"] is None else "steps",
    }
    values = check_types(values, kind)
    if values.get("hub_token"):
        values["hub_token"] = Secret(values["hub_token"])
    try:
        args = kind(**(defaults | values))
    except (TypeError, ValueError, ImportError, OSError, KeyError) as error:
        raise UsageError(f"training: {one_line(error, 400)}") from None
    if isinstance(args, GRPOConfig):
        check_options(args, "training.")
        _check_run(config)
    else:
        objective_of(method, args)  # refuses what no loss reads
    return args, notes


def _check_names(method: str, kind: type[Any], values: dict[str, Any]) -> None:
    """Raises UsageError for fields that the method's configuration has not, or that are said elsewhere."""
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name in set(values) - set(TrainingSection.model_fields):
        elsewhere = ELSEWHERE | ({"chat_template_kwargs": "data.template"} if method == "grpo" else {})
        if name in elsewhere:
            raise UsageError(f"training.{name} is decided by the run; set {elsewhere[name]} instead")
        if name not in known:
            raise unknown_key(f"training.{name}", known, f"the settings of training.method: {method}")
        if method not in OF_METHOD.get(name, (method,)):
            raise UsageError(f"training.{name} is not read by method: {method}; leave it out")


def completion_tokens(config: RunConfig) -> int:
    """The most tokens of a sampled answer. Raises UsageError where they leave no room for a prompt."""
    longest = config.model.max_seq_length
    value = config.training.model_dump().get("max_completion_length")
    if isinstance(value, int) and value >= longest:
        raise UsageError(
            f"training.max_completion_length: got {value}; wanted less than model.max_seq_length ({longest}), which "
            "prompt and answer share"
        )
    return value if isinstance(value, int) and value > 0 else min(MAX_COMPLETION, longest // 2)


def _grpo_defaults(config: RunConfig) -> dict[str, Any]:
    return {"max_completion_length": completion_tokens(config), "num_generations_eval": 1, "log_completions": False}


def _check_run(config: RunConfig) -> None:
    """Raises UsageError for what a run of GRPO has not."""
    training = config.training
    if not training.rewards:
        raise UsageError(
            "training.rewards: grpo learns from rewards, and there are none; set training.rewards=[file.py:function], "
            "or --reward file.py:function"
        )
    for name, is_set in (("early_stopping", training.early_stopping is not None), ("keep", training.keep == "best")):
        if is_set:
            raise UsageError(
                f"training.{name} follows held-out loss, which says nothing of a policy; leave it out, or set "
                "training.load_best_model_at_end with training.metric_for_best_model: reward"
            )


def objective_of(method: str, args: Any) -> Objective:
    """The loss of `method`. Raises UsageError."""
    match method:
        case "kto":
            return kto_objective(args)
        case "orpo":
            return ORPO(args.beta)
        case "simpo":
            return SimPO(args.beta, args.simpo_gamma, args.cpo_alpha, args.label_smoothing)
    return dpo_objective(args)
