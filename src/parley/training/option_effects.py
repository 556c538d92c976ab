"""Options of TrainingArguments and SFTConfig that the libraries accept and leave without effect: refused, or said.

`check_options` refuses values that no library looks at before it is late, and `without_effect` names what was set and
changes nothing. Both read the choices that the libraries declare for their fields.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import trl
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.training_args import OptimizerNames

from parley.errors import UsageError, one_line
from parley.training.sft_config import SFTConfig

SKIP = "skip_prepare_dataset"  # the one key of dataset_kwargs that TRL reads
NOT_OPTIONS = {"function", "args", "kwargs"}
CHECKPOINT_OPTIONS = {*inspect.signature(checkpoint).parameters} - NOT_OPTIONS | {"preserve_rng_state"}
"""Keys of gradient_checkpointing_kwargs: what torch.utils.checkpoint takes (preserve_rng_state among its **kwargs)."""
LIGER_OPTIONS = {
    "rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "swiglu", "geglu", "layer_norm",
}  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "include_num_input_tokens_seen": (True, False, "no", "all", "non_padding"),
}
"""Choices that the libraries document and do not declare, or declare as something else."""
METRIC_INPUTS = ("inputs", "loss")
READS_OPTIM_ARGS = (
    "rmsprop", "ademamix", "anyprecision", "sgd", "adagrad", "galore", "apollo", "grokadamw", "torchao",
    "schedule_free", "stable_adamw",
)  # fmt: skip
PLAIN_PATH_ONLY = (
    "activation_offloading", "gradient_checkpointing", "gradient_checkpointing_kwargs", "pad_to_multiple_of",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "use_liger_kernel",
    "use_cache",
)  # fmt: skip
"""Options of speed and memory alone that the fused step decides by itself."""


REFUSALS = (ValueError, TypeError, RuntimeError, ImportError)  # of torch.compile


class Need(NamedTuple):
    """What an option is read with, in words, and whether that is given."""

    what: str
    given: Callable[[trl.SFTConfig], Any]


HUB = Need("push_to_hub: true", lambda args: args.push_to_hub)
TRACKIO = Need("report_to: trackio", lambda args: {"trackio", "all"} & set(args.report_to or ()))
WORKERS = Need("dataloader_num_workers", lambda args: args.dataloader_num_workers)
NEEDED: dict[str, Need] = {
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"), HUB),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), TRACKIO),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), WORKERS),
    "greater_is_better": Need(
        "metric_for_best_model", lambda args: args.metric_for_best_model or args.load_best_model_at_end
    ),
    "fsdp_config": Need("fsdp", lambda args: args.fsdp),
    "liger_kernel_config": Need("use_liger_kernel: true", lambda args: args.use_liger_kernel),
    "optim_args": Need("an optimizer that takes some", lambda args: _optimizer_has(args, READS_OPTIM_ARGS)),
    "optim_target_modules": Need(
        "a GaLore or APOLLO optimizer", lambda args: _optimizer_has(args, ("galore", "apollo"))
    ),
    "packing_strategy": Need("packing: true", lambda args: args.packing),
    "length_column_name": Need(
        "train_sampling_strategy: group_by_length", lambda args: args.train_sampling_strategy == "group_by_length"
    ),
}
"""Option, to what it has no effect without."""


def check_choices(values: Mapping[str, Any], section: str = "") -> None:
    """Raises UsageError for one of `values`, by the name of the field, that is none of the field's choices."""
    for field in dataclasses.fields(SFTConfig):
        choices = CHOICES.get(field.name) or field.metadata.get("choices")
        value = values.get(field.name)
        if choices and value is not None and value not in choices:
            raise _refused(section + field.name, value, " or ".join(map(str, choices)))


def check_options(args: trl.SFTConfig, section: str = "") -> None:
    """Raises UsageError in one line for a value that the libraries accept and do not know.

    Args:
        section: the prefix of an option's name in the message ("training." for a run's settings).
    """
    check_choices(vars(args), section)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        _check_keys(section + name, vars(args).get(name), CHECKPOINT_OPTIONS)
    _check_keys(section + "liger_kernel_config", args.liger_kernel_config, LIGER_OPTIONS)
    if not isinstance(args.dataset_kwargs, dict | None):
        raise _refused(section + "dataset_kwargs", args.dataset_kwargs, "names with values")
    for value in args.include_for_metrics or ():
        if value not in METRIC_INPUTS:
            raise _refused(section + "include_for_metrics", value, " or ".join(METRIC_INPUTS))
    if args.label_names is not None and "labels" not in args.label_names:
        raise _refused(section + "label_names", args.label_names, "a list with 'labels', which rendered rows have")
    multiple = vars(args).get("pad_to_multiple_of")
    if multiple not in (None, "auto") and not (isinstance(multiple, int) and multiple > 0):
        raise _refused(section + "pad_to_multiple_of", multiple, "1 or more")
    if args.optim_args and not all("=" in pair for pair in str(args.optim_args).split(",")):
        raise _refused(section + "optim_args", args.optim_args, "name=value, with commas between several")
    if args.torch_compile:
        _check_compile(args, section)


def check_tokens(args: trl.SFTConfig, tokenizer: PreTrainedTokenizerBase, section: str = "") -> None:
    """Raises UsageError for an eos_token or pad_token that is no token of `tokenizer`, before rows are rendered."""
    for name in ("eos_token", "pad_token"):
        token = vars(args).get(name)
        if token is not None and token not in tokenizer.get_vocab():
            raise _refused(section + name, token, "a token of the model's vocabulary")


def without_effect(args: trl.SFTConfig) -> list[str]:
    """One line for each option that is set and changes nothing, on either path."""
    changed = _changed(args)
    lines = [
        f"{name} has no effect without {need.what}"
        for name, need in NEEDED.items()
        if name in changed and not need.given(args)
    ]
    if isinstance(args, trl.SFTConfig):
        if args.dataset_num_proc is not None:
            lines.append("dataset_num_proc has no effect: rows are rendered in one process")
        lines += [f"dataset_kwargs: {name} is not read" for name in (args.dataset_kwargs or {}) if name != SKIP]
    if args.optim_args and NEEDED["optim_args"].given(args):
        lines += [f"optim_args: {key} changes nothing for {_optimizer(args)}" for key in _unread_optim_args(args)]
    return lines


def left_to_the_fused_step(args: trl.SFTConfig) -> str | None:
    """The line that names the options of speed and memory in `args` that the fused step does not follow."""
    names = sorted(_changed(args) & set(PLAIN_PATH_ONLY))
    follows = "follows it" if len(names) == 1 else "follows them"
    return f"the fused step decides {', '.join(names)} by itself; engine: plain {follows}" if names else None


def _changed(args: trl.SFTConfig) -> set[str]:
    """Names of the fields of `args` that are not as by default."""
    defaults = vars(_defaults(args.use_cpu))
    return {name for name, value in vars(args).items() if name in defaults and value not in (None, defaults[name])}


@cache
def _defaults(use_cpu: bool) -> SFTConfig:
    # The first arguments of a process choose the device for all: Accelerate keeps one state.
    return SFTConfig("defaults", use_cpu=use_cpu, bf16=False)


def _optimizer(args: trl.SFTConfig) -> str:
    return OptimizerNames(args.optim).value


def _optimizer_has(args: trl.SFTConfig, names: tuple[str, ...]) -> bool:
    return any(name in _optimizer(args) for name in names)


def _unread_optim_args(args: trl.SFTConfig) -> list[str]:
    """Keys of optim_args without which the optimizer would be the same."""
    pairs = [pair.partition("=") for pair in str(args.optim_args).replace(" ", "").split(",")]
    made = {}
    for skipped in (None, *(key for key, _, _ in pairs)):
        kept = copy.copy(args)
        kept.optim_args = ",".join(f"{key}={value}" for key, _, value in pairs if key != skipped) or None
        made[skipped] = str(Trainer.get_optimizer_cls_and_kwargs(kept, torch.nn.Linear(8, 8)))
    return [key for key, _, _ in pairs if made[key] == made[None]]


def _check_keys(name: str, value: Any, known: set[str]) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise _refused(name, value, "names with values")
    for key in value.keys() - known:
        raise _refused(name, key, " or ".join(sorted(known)))


def _check_compile(args: trl.SFTConfig, section: str) -> None:
    try:
        torch.compile(
            torch.nn.Identity(), backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
        )
    except REFUSALS as error:
        raise UsageError(
            f"{section}torch_compile_mode {args.torch_compile_mode}, torch_compile_backend "
            f"{args.torch_compile_backend}: {one_line(error, 200)}"
        ) from None


def _refused(name: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{name}: got {one_line(repr(value), 120)}; wanted {wanted}")
