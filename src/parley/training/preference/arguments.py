"""From a run's settings to TRL's DPOConfig or KTOConfig, and to the loss of training.method.

Every field of the two is reachable under its own name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from parley.config import RunConfig, TrainingSection, unknown_key
from parley.errors import UsageError, one_line
from parley.training.arguments import ELSEWHERE, OWN, UNREAD, Secret, precision, save_steps
from parley.training.check_settings import check_types
from parley.training.preference.config import METHOD_DEFAULTS, DPOConfig, KTOConfig
from parley.training.preference.losses import ORPO, Objective, SimPO, dpo_objective, kto_objective

REFUSED = {
    "padding_free": "documents of a step are always one row without padding",
    "precompute_ref_log_probs": "reference log-probabilities are always measured once and kept",
    "precompute_ref_batch_size": "reference log-probabilities are measured in the passes of a step",
    "dataset_num_proc": "rows are rendered in one process",
}
"""Fields without effect, with the reason."""
OF_METHOD = {"simpo_gamma": ("simpo",), "cpo_alpha": ("simpo",), "loss_type": ("dpo", "kto"), "loss_weights": ("dpo",)}
"""Fields that only some methods read."""


def preference_config(
    config: RunConfig, output_dir: Path, device: torch.device
) -> tuple[DPOConfig | KTOConfig, list[str]]:
    """The arguments to train with, and what was decided on the way in plain words. Raises UsageError in one line."""
    method = config.training.method
    kind = KTOConfig if method == "kto" else DPOConfig
    values = config.training.model_dump(exclude=OWN)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    for name in set(values) - set(TrainingSection.model_fields):
        if name in ELSEWHERE:
            raise UsageError(f"training.{name} is decided by the run; set {ELSEWHERE[name]} instead")
        if name not in known:
            raise unknown_key(f"training.{name}", known, f"the settings of training.method: {method}")
        if method not in OF_METHOD.get(name, (method,)):
            raise UsageError(f"training.{name} is not read by method: {method}; leave it out")
    if method == "kto" and config.training.per_device_train_batch_size < 2 and values.get("loss_type", "kto") == "kto":
        raise UsageError(
            "training.per_device_train_batch_size: got 1; kto estimates the divergence from another row's answer; "
            "set 2 or more"
        )
    notes = [
        f"training.{name} has no effect: {reason}" for name, reason in (REFUSED | UNREAD).items() if name in values
    ]
    for name in REFUSED:
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
        "max_length": config.model.max_seq_length,
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
    objective_of(method, args)  # refuses what no loss reads
    return args, notes


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
