"""A run that is interrupted and resumed ends, bit for bit, where the undisturbed one does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig

from parley.config import LLAMA_PROJECTIONS
from parley.errors import DataError, RunError, UsageError
from parley.training.trainer import SFTTrainer

STEPS = 8  # six of an epoch of 24 rows, then two of the next


def rows(count: int = 24, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, 300, int(rng.integers(5, 20))).tolist() for _ in range(count)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in made])


class StopAt(TrainerCallback):
    """Saves after `step` and ends training there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def make(
    tokenizer: Any,
    folder: Path,
    *,
    dropout: float = 0.0,
    lora: bool = True,
    data: Any = None,
    stop_at: int | None = None,
    rank: int = 4,
    trainer_class: type[trl.SFTTrainer] = SFTTrainer,
    engine: str | None = None,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config).to(torch.float32)
    if lora:
        adapter = LoraConfig(r=rank, target_modules=LLAMA_PROJECTIONS, lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
        "seed": 0,
    }
    args = SFTConfig(output_dir=str(folder), **(defaults | settings))
    options = {} if engine is None else {"engine": engine}
    made = trainer_class(
        model, args, train_dataset=rows() if data is None else data, eval_dataset=rows(4, seed=1),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    if stop_at is not None:
        made.add_callback(StopAt(stop_at))
    return made


def disturb() -> None:
    """Another process has other random states."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def figures(made: Any) -> list[dict[str, Any]]:
    """What was logged at steps and evaluations, without times."""
    logs = [entry for entry in made.state.log_history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in logs]


def trained(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}


def assert_same_end(resumed: Any, whole: Any) -> None:
    ours, theirs = trained(resumed), trained(whole)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []
    assert figures(resumed) == figures(whole)
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert resumed.supervised_tokens == whole.supervised_tokens
    states = [made.optimizer.state_dict() for made in (resumed, whole)]
    assert json.dumps(states[0]["param_groups"]) == json.dumps(states[1]["param_groups"])
    for index, state in states[1]["state"].items():
        for name, value in state.items():
            other = states[0]["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other or name[0] == "_"


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fused": (3, {}),
    "fused, second epoch": (7, {}),
    "fused, at the end of an epoch": (6, {}),
    "fused, 8-bit optimizer": (3, {"optim": "adamw_8bit"}),
    "fused, clipped, cosine, weight decay": (
        5,
        {"max_grad_norm": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1},
    ),
    "fused, logs of two steps, evaluations": (
        3,
        {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "include_num_input_tokens_seen": "all"},
    ),
    "fused, packed": (3, {"packing": True, "max_length": 32, "gradient_accumulation_steps": 1}),
    "fused, 3 steps in an epoch and a rest": (4, {"gradient_accumulation_steps": 5}),
    "plain, dropout and noise": (
        7,
        {"engine": "plain", "dropout": 0.2, "neftune_noise_alpha": 5, "eval_strategy": "steps", "eval_steps": 3},
    ),
    "plain, dropout, at the end of an epoch": (6, {"engine": "plain", "dropout": 0.2, "logging_steps": 4}),
    "plain, Adafactor, gradient checkpointing": (3, {"optim": "adafactor", "gradient_checkpointing": True}),
    "plain, packed": (5, {"engine": "plain", "packing": True, "max_length": 32, "gradient_accumulation_steps": 1}),
    "full fine-tuning": (3, {"lora": False, "learning_rate": 1e-3}),
    "a stream": (7, {"data": rows().to_iterable_dataset()}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_where_the_undisturbed_one_does(tiny_tokenizer: Any, tmp_path: Path, name: str) -> None:
    stop_at, settings = CASES[name]
    whole = make(tiny_tokenizer, tmp_path / "whole", **settings)
    whole.train()
    assert (whole.fused_step is not None) == name.startswith(("fused", "a stream"))
    disturb()
    make(tiny_tokenizer, tmp_path / "run", stop_at=stop_at, **settings).train()
    disturb()
    resumed = make(tiny_tokenizer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same_end(resumed, whole)
