"""Deterministic training, and how often a run saves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from parley.config import RunConfig
from parley.errors import UsageError
from parley.training.arguments import sft_config
from parley.training.checkpointing_trainer import CheckpointingTrainer
from parley.training.determinism import deterministic_algorithms, fix_cublas_workspaces
from parley.training.save_cadence import SaveCadence


def test_torch_is_left_as_it_was() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_a_workspace_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fix_cublas_workspaces()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    fix_cublas_workspaces()
    import os

    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Recording:
    """A trainer's class below CheckpointingTrainer, whose training raises `error`, or says whether torch is asked."""

    error: Exception | None = None

    def train(self, *args: Any, **kwargs: Any) -> bool:
        if self.error is not None:
            raise self.error
        return torch.are_deterministic_algorithms_enabled()


def trainer(deterministic: bool, error: Exception | None = None) -> Any:
    made = type("Made", (CheckpointingTrainer,), {"__init__": lambda self: None})()
    made.deterministic = deterministic
    made.error = error
    return made


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_is_deterministic_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    monkeypatch.setattr("transformers.Trainer.train", Recording.train)
    assert trainer(deterministic).train() is deterministic


def test_an_operator_without_a_deterministic_form_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.Trainer.train", Recording.train)
    fault = RuntimeError("kthvalue CUDA does not have a deterministic implementation,\nbut you set")
    with pytest.raises(UsageError, match=r"deterministic: kthvalue CUDA .*set it to False for this model"):
        trainer(True, fault).train()
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(True, RuntimeError("size mismatch")).train()


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 50),
        (["training.save_steps=7"], 7),
        (["training.eval_steps=20", "training.load_best_model_at_end=true"], 40),
        (["training.eval_steps=20"], 50),
    ],
)
def test_a_run_saves_every_fifty_steps_unless_it_is_told(overrides: list[str], steps: int) -> None:
    args, notes = sft_config(RunConfig.create({}, overrides), Path("out"), torch.device("cpu"))
    assert args.save_steps == steps
    assert any("checkpoints: every" in note for note in notes) == (steps != 7)


def test_a_checkpoint_is_left_out_while_the_last_one_took_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("parley.training.save_cadence.perf_counter", lambda: now)
    made = SimpleNamespace(save_seconds=0.0)
    cadence, args = SaveCadence(made), SimpleNamespace()  # type: ignore[arg-type]

    def is_due(step: int) -> bool:
        control = TrainerControl(should_save=True)
        cadence.on_step_end(args, TrainerState(global_step=step, max_steps=200), control)  # type: ignore[arg-type]
        return control.should_save

    assert is_due(50)  # the first one, whose cost is not known yet
    made.save_seconds = 0.4
    cadence.on_save(args, TrainerState(), TrainerControl())  # type: ignore[arg-type]
    now = 19.0
    assert not is_due(100)
    assert is_due(200)  # the last step
    now = 21.0
    assert is_due(150)
