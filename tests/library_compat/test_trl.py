"""What Parley uses of TRL and overrides in it is there, and is called as expected."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from parley.library_compat.trl import copy_figures, count_tokens, keep_column, metrics, restore_figures, tokens_seen
from parley.training.packed_evaluation import METRICS
from parley.training.trainer import SFTTrainer

# Hooks of Trainer's loop, and of TRL's trainer, that Parley's trainers override.
HOOKS = [
    "create_optimizer",
    "create_scheduler",
    "evaluate",
    "evaluation_loop",
    "floating_point_ops",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_train_dataloader",
    "log",
    "prediction_step",
    "training_step",
    "_clip_grad_norm",
    "_get_grad_norm",
    "_init_training_state",
    "_prepare_dataset",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_save_rng_state",
    "_set_signature_columns_if_needed",
    "_track_num_input_tokens",
]
# Called when training goes on from a checkpoint, which tests/training does.
RESUMING = ["_load_optimizer_and_scheduler"]


@pytest.fixture(scope="module")
def recorded(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[trl.SFTTrainer, Counter[str]]:
    """TRL's own trainer after two steps and an evaluation, and how often it called each hook."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(trl.SFTTrainer, name)(self, *args, **kwargs)

        return call

    recorder = type("Recorder", (trl.SFTTrainer,), {name: counting(name) for name in HOOKS})
    rows = Dataset.from_dict({"text": ["Ahoy matey! It be blue."] * 8})
    args = trl.SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # the device that a user of this machine would have
        bf16=False,
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    trainer = recorder(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer, calls


def test_every_hook_is_called(recorded: tuple[trl.SFTTrainer, Counter[str]]) -> None:
    _, calls = recorded
    assert [name for name in HOOKS if not calls[name]] == []
    # Two micro-batches a step, and a clipping for each of the two steps.
    assert (calls["training_step"], calls["_clip_grad_norm"], calls["_get_grad_norm"]) == (4, 2, 2)


@pytest.mark.parametrize("name", [*HOOKS, *RESUMING])
def test_overriding_methods_take_what_the_hook_takes(name: str) -> None:
    ours = inspect.signature(getattr(SFTTrainer, name)).parameters
    theirs = inspect.signature(getattr(trl.SFTTrainer if name == "_prepare_dataset" else Trainer, name)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert open_ended or list(theirs) == list(ours)


def test_figures_of_the_next_log(recorded: tuple[trl.SFTTrainer, Counter[str]]) -> None:
    trainer, _ = recorded
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert {*METRICS, "num_tokens", "grad_norm", "learning_rate"} <= logged[0].keys()
    assert tokens_seen(trainer) == logged[-1]["num_tokens"]
    metrics(trainer, "train")["entropy"] += [1.0, 2.0]
    count_tokens(trainer, 5)
    trainer.model.train()
    trainer.log({})
    assert trainer.state.log_history[-1]["entropy"] == 1.5
    assert trainer.state.log_history[-1]["num_tokens"] == logged[-1]["num_tokens"] + 5 == tokens_seen(trainer)
    assert not metrics(trainer, "train")["entropy"]
    metrics(trainer, "eval")["entropy"].append(3.0)
    trainer.model.eval()
    trainer.log({})
    assert trainer.state.log_history[-1]["eval_entropy"] == 3.0


def test_an_evaluation_leaves_a_mean_of_each_figure(recorded: tuple[trl.SFTTrainer, Counter[str]]) -> None:
    trainer, _ = recorded
    trainer.model.eval()
    (inputs, *_) = trainer.get_eval_dataloader()
    for name in METRICS:
        metrics(trainer, "eval")[name].clear()
    loss, logits, labels = trainer.prediction_step(trainer.model, dict(inputs), prediction_loss_only=True)
    assert loss is not None
    assert (logits, labels) == (None, None)
    assert [len(metrics(trainer, "eval")[name]) for name in METRICS] == [1, 1]


def test_loss_is_divided_by_the_tokens_of_the_step(recorded: tuple[trl.SFTTrainer, Counter[str]]) -> None:
    trainer, _ = recorded
    (inputs, *_) = trainer.get_train_dataloader()
    trainer.model_accepts_loss_kwargs = True
    mean = trainer.compute_loss(trainer.model, dict(inputs))
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    share = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=4 * supervised)
    torch.testing.assert_close(4 * share, mean)
    trainer.current_gradient_accumulation_steps = 3  # divides nothing where the loss is scaled already
    torch.testing.assert_close(trainer.training_step(trainer.model, dict(inputs), 4 * supervised), share)


def test_figures_are_put_back(recorded: tuple[trl.SFTTrainer, Counter[str]]) -> None:
    trainer, _ = recorded
    metrics(trainer, "train")["entropy"] = [1.0]
    copied, seen = copy_figures(trainer, "train"), tokens_seen(trainer)
    metrics(trainer, "train")["entropy"].append(2.0)
    metrics(trainer, "train")["of a failed pass"].append(1.0)
    count_tokens(trainer, 5)
    restore_figures(trainer, "train", copied)
    assert metrics(trainer, "train")["entropy"] == [1.0]
    assert "of a failed pass" not in metrics(trainer, "train")
    assert tokens_seen(trainer) == seen
    metrics(trainer, "train")["new"].append(1.0)  # still the defaultdict that compute_loss appends to
    metrics(trainer, "train").clear()


def test_a_kept_column_reaches_the_collator(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Which columns TRL hands to its collator is decided in `_signature_columns`."""
    seen: list[set[str]] = []

    class Keeping(trl.SFTTrainer):
        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            keep_column(self, "origin")

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(set(rows[0]))
        return {}

    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "origin": ["a"], "other": ["b"]})
    skipping = {"skip_prepare_dataset": True}
    args = trl.SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", dataset_kwargs=skipping)
    args.remove_unused_columns = True
    made = Keeping(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder), args, train_dataset=rows, data_collator=collate
    )
    next(iter(made.get_train_dataloader()))
    assert seen == [{"input_ids", "labels", "origin"}]
