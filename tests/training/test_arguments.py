from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parley
from parley.config import RunConfig
from parley.errors import UsageError
from parley.training.arguments import sft_config

CPU = torch.device("cpu")


def config(*overrides: str) -> RunConfig:
    return RunConfig.create({}, overrides)


def test_the_reference_job_is_the_default() -> None:
    args, _ = sft_config(config(), Path("out"), CPU)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)
    assert (args.learning_rate, args.weight_decay, args.warmup_steps) == (2e-4, 0.01, 5)
    assert (args.lr_scheduler_type, args.logging_steps, args.seed) == ("linear", 1, 3407)
    assert (args.save_total_limit, args.report_to, args.max_length) == (2, [], 2048)


def test_the_optimizer_follows_the_device_and_is_said() -> None:
    args, notes = sft_config(config(), Path("out"), CPU)
    assert args.optim == "adamw_torch_fused"
    assert notes[0] == "optimizer: fused AdamW"
    args, notes = sft_config(config("training.optim=sgd", "training.save_steps=9"), Path("out"), CPU)
    assert (args.optim, notes) == ("sgd", [])


def test_a_loss_that_is_not_a_number_is_logged_as_such() -> None:
    args, _ = sft_config(config(), Path("out"), CPU)
    assert args.logging_nan_inf_filter is False
    args, _ = sft_config(config("training.logging_nan_inf_filter=true"), Path("out"), CPU)
    assert args.logging_nan_inf_filter is True


def test_any_field_of_sftconfig_passes_through() -> None:
    args, _ = sft_config(config("training.neftune_noise_alpha=5", "training.max_grad_norm=0.3"), Path("out"), CPU)
    assert (args.neftune_noise_alpha, args.max_grad_norm) == (5, 0.3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learnin_rate=1", "did you mean 'learning_rate'"),
        ("training.lr=1", "here it is training.learning_rate"),
        ("training.epochs=1", "here it is training.num_train_epochs"),
        ("training.batch_size=1", "here it is training.per_device_train_batch_size"),
        ("training.output_dir=x", "set output instead"),
        ("training.max_length=5", "set model.max_seq_length instead"),
        ("training.lr_scheduler_type=zigzag", "zigzag"),
    ],
)
def test_wrong_fields_are_named_in_one_line(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        sft_config(config(override), Path("out"), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [parley.SFTConfig, parley.DPOConfig, parley.KTOConfig, parley.GRPOConfig])
def test_the_warmup_ratio_of_older_notebooks_is_followed(config: Any, tmp_path: Path) -> None:
    assert config(output_dir=str(tmp_path), warmup_ratio=0.1, use_cpu=True).warmup_steps == 0.1
    assert config(output_dir=str(tmp_path), warmup_ratio=0.1, warmup_steps=5, use_cpu=True).warmup_steps == 5
