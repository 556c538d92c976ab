"""Losses, log-probabilities and gradients of preference steps equal TRL's, on the fused step and on the plain path."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import trl
from datasets import Dataset

import parley
from parley.training.preference.preference_trainer import PreferenceTrainer

from .conftest import demo_adapter, gradients, shake

Engine = Literal["auto", "plain"]
BOUND = {"rtol": 1e-5, "atol": 1e-5}


def micro_batches(trainer: Any) -> list[dict[str, Any]]:
    """Rows 0, 1 and rows 2, 3."""
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    size = trainer.args.per_device_train_batch_size
    return [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]


def trl_step(trainer: Any) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Mean loss of the micro-batches, its gradients, and the mean of each logged figure."""
    trainer.model.train()
    trainer.model.zero_grad()
    batches = micro_batches(trainer)
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        (loss / len(batches)).backward()
        losses.append(loss.detach())
    figures = {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}
    return float(torch.stack(losses).mean()), gradients(trainer.model), figures


def parley_step(trainer: PreferenceTrainer) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    trainer.bind_fused_step()
    trainer.model.zero_grad()
    batches = micro_batches(trainer)
    for index, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
        loss = trainer.training_step(trainer.model, batch)
    figures = {name: float(sum(values) / len(values)) for name, values in trainer._metrics["train"].items()}
    return float(loss), gradients(trainer.model), figures


def compare(ours: PreferenceTrainer, theirs: Any, *, fused: bool) -> None:
    """One step of both, away from the reference."""
    shake(ours.model)
    shake(theirs.model)
    loss, gradient, figures = parley_step(ours)
    assert (ours.fused_step is not None) is fused, ours.plain_because
    expected_loss, expected, expected_figures = trl_step(theirs)
    torch.testing.assert_close(loss, expected_loss, **BOUND)
    assert gradient.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, **BOUND, msg=lambda text, name=name: f"{name}: {text}")
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "num_tokens",
    ):
        if name in figures:
            torch.testing.assert_close(figures[name], float(expected_figures[name]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_dpo_step_equals_trls(loss: str, engine: Engine, pairs: Dataset, options: dict[str, Any]) -> None:
    model, tokenizer = demo_adapter()
    other, _ = demo_adapter()
    ours = parley.DPOTrainer(
        model, args=parley.DPOConfig(loss_type=[loss], **options), train_dataset=pairs, processing_class=tokenizer,
        engine=engine,
    )  # fmt: skip
    theirs = trl.DPOTrainer(
        other, args=trl.DPOConfig(loss_type=[loss], **options), train_dataset=pairs, processing_class=tokenizer
    )
    compare(ours, theirs, fused=engine == "auto")
