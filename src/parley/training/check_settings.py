"""Checks of a run's training settings before anything is loaded or written.

TRL and transformers find most wrong values late: in the trainer's constructor, when the first step asks for an
optimizer, or at the first evaluation. Each check here builds a small copy of what they will build, from the same
arguments and with the same public function, so that their own message comes first and no rule is written down twice.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from parley.config import RunConfig
from parley.config_values import MAX_COUNT, checked_path
from parley.errors import UsageError, one_line
from parley.models.adapters import check_lora
from parley.text import shorten_middle
from parley.training.sft_config import SFTConfig

# What the libraries raise for a value they refuse. Only settings reach the calls below, so none of these hides a fault.
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, KeyError, AttributeError, OSError)
MAX_WORKERS = 256  # processes of a data loader; each takes a second and 300 MB
MAX_ACCUMULATION = 65_536  # rows: the largest batches in print are of a few thousand
PROBE_STEPS = 100


class Range(NamedTuple):
    low: float
    high: float


PATHS = ("resume_from_checkpoint", "deepspeed", "fsdp_config")

# Fields of SFTConfig that neither the library nor a copy built from them bounds.
RANGES = {
    "gradient_accumulation_steps": Range(1, MAX_ACCUMULATION),
    "per_device_train_batch_size": Range(1, MAX_ACCUMULATION),
    "num_train_epochs": Range(0, 1e6),
    "warmup_steps": Range(0, MAX_COUNT),
    "max_grad_norm": Range(0, 1e30),
    "label_smoothing_factor": Range(0, 1),
    "neftune_noise_alpha": Range(0, 1e6),
    "per_device_eval_batch_size": Range(1, MAX_COUNT),
    "dataloader_num_workers": Range(0, MAX_WORKERS),
    "eval_steps": Range(0, MAX_COUNT),
    "eval_delay": Range(0, MAX_COUNT),
    "eval_accumulation_steps": Range(1, MAX_COUNT),
    "save_total_limit": Range(1, MAX_COUNT),
    "dataset_num_proc": Range(1, MAX_WORKERS),
    "ddp_timeout": Range(1, MAX_COUNT),
    "ddp_bucket_cap_mb": Range(1, MAX_COUNT),
    "router_aux_loss_coef": Range(0, 1e6),
    "warmup_ratio": Range(0, 1),
    "torch_empty_cache_steps": Range(1, MAX_COUNT),
    "beta": Range(0, 1e6),
    "num_generations": Range(2, 1024),
    "num_generations_eval": Range(1, 1024),
    "max_prompt_length": Range(1, MAX_COUNT),
    "max_completion_length": Range(1, MAX_COUNT),
    "num_iterations": Range(1, 1024),
    "steps_per_generation": Range(1, MAX_ACCUMULATION),
    "generation_batch_size": Range(1, MAX_ACCUMULATION),
    "simpo_gamma": Range(0, 1e6),
    "cpo_alpha": Range(0, 1e6),
    "label_smoothing": Range(0, 0.5),
    "desirable_weight": Range(0, 1e6),
    "undesirable_weight": Range(0, 1e6),
}


def check_types(values: dict[str, Any], config: type[TrainingArguments] = SFTConfig) -> dict[str, Any]:
    """`values` of the fields of `config`, each converted to the type that it declares ("1e-8" to 1e-8).

    Raises UsageError for the first that cannot be, or that is out of its range.
    """
    declared = {name: field.type for name, field in config.__dataclass_fields__.items()}
    converted = {name: _converted(name, value, declared[name]) for name, value in values.items()}
    for name in PATHS:
        if isinstance(converted.get(name), str):
            try:
                converted[name] = checked_path(converted[name])
            except ValueError as error:
                raise setting_error(name, error) from None
    if converted.get("bf16") and converted.get("fp16"):
        raise setting_error("fp16", "bf16 is true as well; set one of the two")
    return converted


def check_settings(config: RunConfig, args: SFTConfig) -> None:
    """Raises UsageError in one line for settings with which the trainer could not begin, or could not continue."""
    _check_heldout(config, args)
    _check_packages(args)
    _check_optimizer_and_scheduler(args)
    _check_data_loader(args)
    _check_checkpoint(args)
    if config.lora is not None:
        check_lora(config.lora)


def check_best_metric(args: SFTConfig, metrics: dict[str, float]) -> None:
    """Raises UsageError where an evaluation does not give the metric that decides which checkpoint is best."""
    name = args.metric_for_best_model
    if name is None or not (args.load_best_model_at_end or args.save_strategy == "best"):
        return
    if f"eval_{name.removeprefix('eval_')}" not in metrics:
        raise setting_error("metric_for_best_model", f"got {name!r}; an evaluation gives {', '.join(sorted(metrics))}")


def setting_error(name: str, error: BaseException | str) -> UsageError:
    """The error for the setting `name`, or for all of the section where the library does not say which."""
    return UsageError(f"{f'training.{name}' if name else 'training'}: {one_line(error, 400)}")


def _converted(name: str, value: Any, declared: Any) -> Any:
    try:
        converted = TypeAdapter(
            declared, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid")
        ).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"training.{name}: got {shorten_middle(repr(value), 120)}; {first['msg']}") from None
    low, high = RANGES.get(name, Range(-float("inf"), float("inf")))
    if isinstance(converted, int | float) and not low <= converted <= high:
        raise UsageError(f"training.{name}: got {value!r}; wanted a number from {low:g} to {high:g}")
    return converted


def _check_heldout(config: RunConfig, args: SFTConfig) -> None:
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if evaluates and config.data.heldout is None and config.data.heldout_rows == 0:
        name = "eval_strategy" if config.training.eval_steps is None else "eval_steps"
        raise setting_error(name, "evaluates on held-out rows; set data.heldout_rows or data.heldout")
    for name, is_set in (
        ("early_stopping", config.training.early_stopping is not None),
        ("keep", config.training.keep == "best"),
    ):
        if is_set and args.eval_strategy == "no":
            raise setting_error(name, "needs held-out loss during training; set training.eval_steps, for example to 50")
        if is_set and args.load_best_model_at_end:
            raise setting_error(
                "load_best_model_at_end", f"chooses the weights, as training.{name} does; set one of them"
            )
    if args.eval_strategy == "steps" and not (args.eval_steps or 0) > 0:
        raise setting_error("eval_steps", f"got {args.eval_steps}; wanted 1 or more with eval_strategy: steps")
    if (args.load_best_model_at_end or args.save_strategy == "best") and args.metric_for_best_model is None:
        raise setting_error("metric_for_best_model", "is not set; save_strategy: best needs one, such as eval_loss")


def _check_packages(args: SFTConfig) -> None:
    """Packages of options that import theirs late. (The optimizer's are found by making it.)"""
    for option, wanted, module, package in (
        ("use_liger_kernel", args.use_liger_kernel, "liger_kernel", "liger-kernel"),
        ("deepspeed", args.deepspeed, "deepspeed", "deepspeed"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise setting_error(option, f"the package is not installed; pip install {package}, or leave the option out")
    for integration in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([integration]):
                callback()
        except REFUSALS as error:
            advice = "" if "pip install" in str(error) else f"; pip install {integration}, or set report_to: none"
            raise setting_error("report_to", f"{one_line(error)}{advice}") from None


def _check_optimizer_and_scheduler(args: SFTConfig) -> None:
    probe = torch.nn.Linear(8, 8, bias=False)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, probe)
        optimizer = optimizer_class(probe.parameters(), **options)
    except ImportError as error:
        raise setting_error("optim", error) from None
    except REFUSALS as error:
        if args.optim_target_modules is None:  # with them it looks for layers that the probe does not have
            raise setting_error("optim", error) from None
        optimizer = torch.optim.SGD(probe.parameters(), lr=args.learning_rate)
    _check_scheduler(args, optimizer)


def _check_scheduler(args: SFTConfig, optimizer: torch.optim.Optimizer) -> None:
    steps = args.max_steps if args.max_steps > 0 else PROBE_STEPS
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,  # within the warmup a wrong argument of what follows it is not read
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except REFUSALS as error:
        raise setting_error("lr_scheduler_kwargs", f"{args.lr_scheduler_type}: {one_line(error)}") from None


def _check_data_loader(args: SFTConfig) -> None:
    try:
        DataLoader(
            torch.zeros(1),
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor if args.dataloader_num_workers else None,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    except REFUSALS as error:
        raise setting_error("dataloader_num_workers", error) from None


def _check_checkpoint(args: TrainingArguments) -> None:
    path = args.resume_from_checkpoint
    if path and not (Path(path) / "trainer_state.json").is_file():
        raise setting_error("resume_from_checkpoint", f"{path}: no checkpoint there (no trainer_state.json)")
