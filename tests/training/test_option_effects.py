"""Every field of SFTConfig: nonsense is refused or named in one line, and so is what the fused step does not follow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from parley.config import RunConfig
from parley.errors import ParleyError, UsageError
from parley.training import option_effects
from parley.training.arguments import ELSEWHERE, UNREAD, sft_config
from parley.training.check_settings import check_settings
from parley.training.option_effects import (
    NEEDED,
    PLAIN_PATH_ONLY,
    check_options,
    check_tokens,
    left_to_the_fused_step,
    without_effect,
)
from parley.training.sft_config import SFTConfig

FIELDS = [field.name for field in dataclasses.fields(SFTConfig)]
FREE_TEXT = {"run_name", "hub_token", "metric_for_best_model", "eos_token", "pad_token"}
"""Any text may be meant; tokens and the metric are checked once the tokenizer and an evaluation are there."""
REFUSED_BY_FUSED_STEP = {
    "fp16", "bf16_full_eval", "fp16_full_eval", "optim", "label_smoothing_factor", "loss_type", "neftune_noise_alpha",
    "optim_target_modules", "debug", "deepspeed", "fsdp", "bf16",
}  # fmt: skip
"""Options with values for which the fused step gives way to the plain path; each is tested in test_fused_trainer.py."""
FOLLOWED = {
    # by the loop of transformers' Trainer and by TRL, which both paths share
    "accelerator_config", "adam_beta1", "adam_beta2", "adam_epsilon", "auto_find_batch_size",
    "average_tokens_across_devices", "data_seed", "dataloader_drop_last", "dataloader_in_order",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "disable_tqdm",
    "enable_jit_checkpoint", "eval_delay", "eval_on_start", "eval_packing", "eval_steps", "eval_strategy",
    "full_determinism", "gradient_accumulation_steps", "ignore_data_skip", "include_num_input_tokens_seen",
    "learning_rate", "load_best_model_at_end", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "lr_scheduler_kwargs",
    "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "packing", "per_device_eval_batch_size",
    "per_device_train_batch_size", "push_to_hub", "report_to", "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint", "save_on_each_node", "save_only_model", "save_steps", "save_strategy",
    "save_total_limit", "seed", "shuffle_dataset", "skip_memory_metrics", "tf32", "train_sampling_strategy",
    "warmup_ratio", "warmup_steps", "weight_decay",
    # true of the fused step, whose rows have no padding
    "padding_free",
    # of the model: TRL refuses it where the model has no router
    "router_aux_loss_coef",
    # of several processes, for batches of a collator of the user's own
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph",
    "ddp_timeout", "parallelism_config",
}  # fmt: skip
OLD_NAMES = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # and new ones of gradient_checkpointing


def arguments(**values: Any) -> tuple[SFTConfig, list[str]]:
    config = RunConfig.create({"training": values})
    args, notes = sft_config(config, Path("out"), torch.device("cpu"))
    check_settings(config, args)
    return args, notes


def python_arguments(**values: Any) -> SFTConfig:
    return SFTConfig("out", use_cpu=True, report_to="none", **values)


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["nonsense", ["nonsense"], {"nonsense": 1}, -7], ids=str)
def test_nonsense_is_refused_or_named(field: str, value: Any) -> None:
    try:
        args, notes = arguments(**{field: value})
    except ParleyError as error:
        said = str(error)
        assert "\n" not in said
        assert field in said or "nonsense" in said or str(value) in said
        return
    if field in FREE_TEXT:
        return
    assert any(field in line for line in [*notes, *without_effect(args)])


def test_every_option_is_followed_refused_or_named() -> None:
    """A field that a new version of TRL brings fails here until somebody looked at what the fused step makes of it."""
    known = FOLLOWED | REFUSED_BY_FUSED_STEP | FREE_TEXT | OLD_NAMES
    known |= {*PLAIN_PATH_ONLY, *NEEDED, *UNREAD, *ELSEWHERE, "dataset_num_proc"}
    assert set(FIELDS) - known == set()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train_sampling_strategy": "nonsense"},
            "train_sampling_strategy: got 'nonsense'; wanted random or sequential",
        ),
        ({"truncation_mode": "nonsense"}, "truncation_mode: got 'nonsense'; wanted keep_end or keep_start"),
        ({"gradient_checkpointing_kwargs": {"reentrant": True}}, "gradient_checkpointing_kwargs: got 'reentrant'"),
        ({"torch_compile_mode": "nonsense"}, "torch_compile_mode nonsense.*Unrecognized mode"),
        ({"torch_compile_backend": "nonsense"}, "torch_compile_backend nonsense.*Invalid backend"),
        ({"packing_strategy": "nonsense"}, "packing_strategy: got 'nonsense'"),
        ({"loss_type": "nonsense"}, "loss_type: got 'nonsense'"),
        ({"include_for_metrics": ["labels"]}, "include_for_metrics: got 'labels'; wanted inputs or loss"),
        ({"label_names": ["targets"]}, "label_names: .* wanted a list with 'labels'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: got 0; wanted 1 or more"),
        ({"dataset_kwargs": ["x"]}, "dataset_kwargs: .* wanted names with values"),
        ({"liger_kernel_config": {"nonsense": True}}, "liger_kernel_config: got 'nonsense'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_the_libraries_accept_and_do_not_know_are_refused_in_python_too(values: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_options(python_arguments(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"hub_model_id": "me/x"}, "hub_model_id has no effect without push_to_hub: true"),
        ({"project": "x"}, "project has no effect without report_to: trackio"),
        (
            {"optim_target_modules": ["q_proj"]},
            "optim_target_modules has no effect without a GaLore or APOLLO optimizer",
        ),
        ({"optim_args": "rank=3"}, "optim_args has no effect without an optimizer that takes some"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, nonsense=1"}, "optim_args: nonsense changes nothing for sgd"),
        ({"fsdp_config": {"min_num_params": 1}}, "fsdp_config has no effect without fsdp"),
        ({"packing_strategy": "wrapped"}, "packing_strategy has no effect without packing: true"),
        ({"dataset_num_proc": 2}, "dataset_num_proc has no effect: rows are rendered in one process"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "dataset_kwargs: add_special_tokens is not read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_nothing_is_named_in_one_line(values: Any, line: str) -> None:
    assert without_effect(python_arguments(**values)) == [line]


def test_options_with_an_effect_are_not_named() -> None:
    assert without_effect(python_arguments()) == []
    assert left_to_the_fused_step(python_arguments()) is None
    effective = {"push_to_hub": True, "hub_model_id": "me/x", "packing": True, "packing_strategy": "wrapped"}
    assert without_effect(python_arguments(**effective)) == []
    check_options(python_arguments(gradient_checkpointing_kwargs={"use_reentrant": False}, torch_compile=True))


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile_mode": "reduce-overhead"},
        {"torch_empty_cache_steps": 5},
        {"activation_offloading": True},
        {"pad_to_multiple_of": 8},
        {"use_liger_kernel": True},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_the_fused_step_decides_by_itself_is_named(values: Any) -> None:
    line = left_to_the_fused_step(python_arguments(**values))
    assert line is not None
    assert next(iter(values)) in line
    assert line.endswith(("by itself; engine: plain follows it", "by itself; engine: plain follows them"))


@pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_the_tokenizer_lacks_is_refused(tiny_tokenizer: Any, name: str) -> None:
    args, _ = arguments(**{name: "<|nonsense|>"})
    with pytest.raises(UsageError, match=rf"training\.{name}: got '<\|nonsense\|>'; wanted a token"):
        check_tokens(args, tiny_tokenizer, "training.")
    args, _ = arguments(**{name: "<|eot_id|>"})
    check_tokens(args, tiny_tokenizer, "training.")


@pytest.mark.parametrize("use_cpu", [False, True])
def test_defaults_choose_no_other_device_than_the_arguments(use_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate keeps one state for a process: defaults made for a CPU would move a model off its GPU."""
    args = SFTConfig("unused", use_cpu=use_cpu, bf16=False)
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> SFTConfig:
        made.append(kwargs)
        return SFTConfig(*args, **kwargs)

    monkeypatch.setattr(option_effects, "SFTConfig", make)
    option_effects._defaults.cache_clear()
    option_effects.without_effect(args)
    assert [kwargs["use_cpu"] for kwargs in made] == [use_cpu]
