"""From a run's settings to TRL's SFTConfig. Every field of SFTConfig is reachable under its own name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from parley.config import RunConfig, TrainingSection
from parley.config_keys import unknown_key
from parley.errors import UsageError, one_line
from parley.training.check_settings import check_types
from parley.training.option_effects import check_choices, check_options
from parley.training.save_cadence import SAVE_STEPS
from parley.training.sft_config import SFTConfig, has_bf16
from parley.training.shard_decision import shards_weights

# Fields that would contradict what the run decides elsewhere, and where to say it instead.
ELSEWHERE = {
    "output_dir": "output",
    "max_length": "model.max_seq_length",
    "max_seq_length": "model.max_seq_length",
    "truncation_mode": "data.overlong",
    "dataset_kwargs": "data",
    "trust_remote_code": "model.trust_remote_code",
    "use_cpu": "model.device",
    # They would leave the weights in 16 bits after the evaluation before training.
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.format",
    "chat_template_path": "model.chat_template",
    "model_init_kwargs": "model",
    "dataset_text_field": "data.columns",
    "data_seed": "training.seed",
}
# Settings of the training section that are Parley's own.
OWN = {
    "method",
    "rewards",
    "deterministic",
    "engine",
    "memory",
    "shard",
    "context_parallel",
    "early_stopping",
    "keep",
    "nonfinite",
    "nonfinite_limit",
}
# Fields that a run's own commands do not read, with the reason.
UNREAD = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
    **dict.fromkeys(
        (
            "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
            "include_for_metrics", "prediction_loss_only",
        ),
        "an evaluation of a run gathers no predictions",
    ),
    "label_names": "rendered rows have labels alone",
    "local_rank": "the launcher gives each process its own",
    "remove_unused_columns": "rendered rows have no others",
    "use_cache": "training uses no cache",
}  # fmt: skip
PREPARING = ("packing", "eval_packing", "shuffle_dataset")


def sft_config(config: RunConfig, output_dir: Path, device: torch.device) -> tuple[SFTConfig, list[str]]:
    """The arguments TRL trains with, and what was decided on the way in plain words.

    Raises UsageError for a field that SFTConfig lacks (with the nearest it has), one that is said elsewhere in the
    run's settings, or a value SFTConfig refuses.
    """
    values = config.training.model_dump(exclude=OWN)
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for name in set(values) - set(TrainingSection.model_fields):
        if name in ELSEWHERE:
            raise UsageError(f"training.{name} is decided by the run; set {ELSEWHERE[name]} instead")
        if name not in known:
            raise unknown_key(f"training.{name}", known, "the run's settings")

    notes = []
    if values["optim"] == "auto":
        # bitsandbytes' optimizers do not know sharded weights.
        eight_bit = device.type == "cuda" and not (config.lora is None and shards_weights(config))
        values["optim"] = "adamw_8bit" if eight_bit else "adamw_torch_fused"
        notes.append(f"optimizer: {'8-bit' if eight_bit else 'fused'} AdamW")
    if values["save_steps"] == "auto":
        values["save_steps"] = save_steps(values)
        notes.append(f"checkpoints: every {values['save_steps']} steps, where that takes little of the time")
    defaults: dict[str, Any] = {
        **precision(device, values),
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 2,
        "max_length": config.model.max_seq_length,
        # Rows are rendered already, and TRL would map over them once more; packing and shuffling are part of that.
        "dataset_kwargs": {"skip_prepare_dataset": not any(map(values.get, PREPARING))},
        "use_cpu": device.type == "cpu",
        "output_dir": str(output_dir),
        # transformers has two arguments for one switch.
        "eval_strategy": "no" if values["eval_steps"] is None else "steps",
    }
    values = check_types(values)
    notes += [f"training.{name} has no effect: {reason}" for name, reason in UNREAD.items() if name in values]
    if values.get("hub_token"):
        values["hub_token"] = Secret(values["hub_token"])
    check_choices(values, "training.")  # transformers looks at some when it is late for a clear message
    try:
        args = SFTConfig(**(defaults | values))
    except (TypeError, ValueError, ImportError, OSError, KeyError) as error:
        raise UsageError(f"training: {one_line(error, 400)}") from None
    check_options(args, "training.")
    return args, notes


def save_steps(values: dict[str, Any]) -> int:
    """For save_steps: auto. transformers wants a multiple of eval_steps where the best checkpoint is loaded."""
    every = values["eval_steps"]
    if not values.get("load_best_model_at_end") or every is None or every < 1:
        return SAVE_STEPS
    return int(every) * max(1, round(SAVE_STEPS / every))


class Secret(str):
    """Text that is not written: it prints as ***, and pickles (training_args.bin) to an empty string."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("",)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: Any) -> Secret:
        return self


def precision(device: torch.device, values: dict[str, Any]) -> dict[str, bool]:
    """bf16 where the GPU has it, else fp16; plain fp32 on a CPU. What the user set is left alone."""
    if "bf16" in values or "fp16" in values:
        return {"bf16": False} if values.get("fp16") else {}
    if device.type == "cpu":
        return {"bf16": False, "fp16": False}
    bf16 = has_bf16()
    return {"bf16": bf16, "fp16": not bf16}
