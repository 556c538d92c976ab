"""The weights of the best evaluation: which are written, which are kept, and that a resumed run finds them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from tests.training.rows import supervised_rows
from tests.training.test_fused_trainer import trainer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from parley.config import EarlyStoppingSection
from parley.training.best_weights import BestWeights
from parley.training.early_stopping import EarlyStopping, evaluations, lowest
from parley.training.last_good_weights import KEPT, LastGoodWeights

QUIET = Console(quiet=True)


def evaluated(best: BestWeights, model: nn.Linear, losses: dict[int, float], args: TrainingArguments) -> TrainerState:
    """Call `best` as a trainer does at each of these evaluations; the weights are those of the step."""
    state = TrainerState()
    for step, loss in losses.items():
        state.global_step = step
        state.log_history.append({"step": step, "eval_loss": loss})
        with torch.no_grad():
            model.weight.fill_(step)
        best.on_evaluate(args, state, TrainerControl(), model=model)
    return state


@pytest.mark.parametrize(
    ("losses", "checkpoints", "kept"),
    [
        ({10: 3.0, 20: 2.0, 30: 2.5}, [], {20}),
        ({10: 3.0, 20: 2.0, 30: 1.5}, [15], {10, 30}),  # resumed from 15, the best is that of 10
        ({10: 3.0, 20: 2.0, 30: 1.5}, [25], {20, 30}),
        ({10: 1.0, 20: 2.0}, [15], {10}),
        ({10: float("nan"), 20: float("inf")}, [], set()),
    ],
)
def test_what_is_kept(tmp_path: Path, losses: dict[int, float], checkpoints: list[int], kept: set[int]) -> None:
    args = TrainingArguments(str(tmp_path / "checkpoints"), use_cpu=True)
    for step in checkpoints:
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "checkpoint-x").mkdir()
    best, model = BestWeights(tmp_path / "best"), nn.Linear(2, 2, bias=False)
    state = evaluated(best, model, losses, args)
    assert {int(path.stem.removeprefix("step-")) for path in (tmp_path / "best").glob("*")} == kept
    restored = best.restore(model, state)
    if kept:
        assert restored is not None
        assert restored.loss == min(losses.values())
        assert torch.equal(model.weight, torch.full((2, 2), float(restored.step)))
    else:
        assert restored is None


def test_weights_that_are_gone_do_not_count(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path / "checkpoints"), use_cpu=True)
    (tmp_path / "checkpoints" / "checkpoint-15").mkdir(parents=True)
    best, model = BestWeights(tmp_path / "best"), nn.Linear(2, 2, bias=False)
    state = evaluated(best, model, {10: 3.0, 20: 1.0, 30: 2.0}, args)
    (tmp_path / "best" / "step-20.safetensors").unlink()
    restored = best.restore(model, state)  # of step 30 they are in the model
    assert restored is not None
    assert restored.step == 30
    assert torch.equal(model.weight, torch.full((2, 2), 30.0))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "swapped"])
def test_weights_that_are_damaged_do_not_count(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(str(tmp_path / "checkpoints"), use_cpu=True)
    (tmp_path / "checkpoints" / "checkpoint-15").mkdir(parents=True)
    best, model = BestWeights(tmp_path / "best"), nn.Linear(2, 2, bias=False)
    state = evaluated(best, model, {10: 3.0, 20: 1.0, 30: 4.0}, args)
    path = tmp_path / "best" / "step-20.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case "cut":
            content = content[:-3]
        case "flipped":
            content[-1] ^= 1
        case "emptied":
            content = bytearray()
        case "swapped":
            other = tmp_path / "best" / "step-10.safetensors"
            content = bytearray(other.read_bytes()[:-1] + b"\x00")
    path.write_bytes(content)
    restored = best.restore(model, state)
    assert restored is not None
    assert restored.step == 10
    assert torch.equal(model.weight, torch.full((2, 2), 10.0))
    assert "step-20.safetensors is damaged and not used" in caplog.text


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_resumed_run_keeps_and_stops_as_the_undisturbed_one(tiny_tokenizer: Any, tmp_path: Path, engine: Any) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3, "save_steps": 3, "max_steps": 8}

    def run(folder: Path, checkpoint: str | None = None) -> tuple[Any, BestWeights, EarlyStopping]:
        best = BestWeights(folder / "best")
        stopping = EarlyStopping(EarlyStoppingSection(patience=4), QUIET)
        made = trainer(
            tiny_tokenizer, folder, 8, settings=settings, engine=engine, callbacks=[best, stopping],
            eval_dataset=supervised_rows(4),
        )  # fmt: skip
        made.train(resume_from_checkpoint=checkpoint)
        return made, best, stopping

    whole, best, stopping = run(tmp_path / "whole")
    # Killed after its checkpoint of step 3: what later evaluations left in best/ is there, too.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    resumed, best_again, stopping_again = run(tmp_path / "killed", str(tmp_path / "killed" / "checkpoint-3"))
    assert evaluations(resumed.state) == evaluations(whole.state)
    assert stopping_again.reason == stopping.reason
    kept = [each.restore(made.model, made.state) for each, made in ((best, whole), (best_again, resumed))]
    assert kept[0] == kept[1] == lowest(evaluations(whole.state))
    weights = [get_peft_model_state_dict(made.model) for made in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_newest_copy_that_gives_numbers_is_restored() -> None:
    good, model = LastGoodWeights(), nn.Linear(2, 2)
    args, control = TrainingArguments(use_cpu=True), TrainerControl()

    def at(step: int, hook: Any) -> None:
        with torch.no_grad():
            model.weight.fill_(step)
        hook(args, TrainerState(global_step=step), control, model=model)

    at(1, good.on_evaluate)  # before training
    assert not good.copies
    at(0, good.on_train_begin)
    for step in (10, 20, 30, 40):
        at(step, good.on_save if step % 20 else good.on_evaluate)
    assert list(good.copies) == [0, *(10, 20, 30, 40)[-KEPT:]]
    assert good.restore(model, lambda: bool(model.weight[0, 0] > 30)) == 30
    assert torch.equal(model.weight, torch.full((2, 2), 30.0))
    assert good.restore(model, lambda: bool(model.weight[0, 0] > 5)) == 0
    assert good.restore(model, lambda: True) is None
