"""Which evaluation is the best, and when training stops because of it."""

from __future__ import annotations

import io
from math import inf, nan

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from parley.config import EarlyStoppingSection
from parley.training.early_stopping import EarlyStopping, Evaluated, evaluations, lowest, without_improvement


def state_of(*losses: float | None) -> TrainerState:
    history = [{"step": 10 * (index + 1), "eval_loss": loss} for index, loss in enumerate(losses)]
    return TrainerState(global_step=10 * len(losses), log_history=[{"step": 5, "loss": 1.0}, *history])


def test_evaluations_are_read_from_the_log_and_those_before_training_left_out() -> None:
    state = state_of(2.0, 1.5)
    state.log_history += [{"step": 0, "eval_loss": 0.5}, {"step": 20, "eval_loss": 1.25}]  # the last one again
    assert evaluations(state) == [Evaluated(10, 2.0), Evaluated(20, 1.25)]


@pytest.mark.parametrize(
    ("losses", "step"),
    [([3, 2, 2, 4], 20), ([nan, 5], 20), ([inf, nan], None), ([], None), ([None, 1.0], 20)],
)
def test_the_lowest_finite_loss_is_the_best(losses: list[float | None], step: int | None) -> None:
    best = lowest(evaluations(state_of(*losses)))
    assert (best.step if best else None) == step


@pytest.mark.parametrize(
    ("losses", "min_delta", "count"),
    [
        ([3, 2, 1], 0, 0),
        ([3, 2, 2], 0, 1),  # equal is no improvement
        ([1, 2, 3, 0.9], 0, 0),
        ([1, 2, 3], 0, 2),
        ([3, 2.95, 2.9], 0.2, 2),  # slower than min_delta, also where it adds up to less
        ([3, 2.9, 2.75], 0.2, 0),  # measured against the best that counted
        ([1, nan, nan], 0, 2),
        ([inf, 5], 0, 0),
    ],
)
def test_evaluations_without_improvement(losses: list[float], min_delta: float, count: int) -> None:
    assert without_improvement(evaluations(state_of(*losses)), min_delta) == count


@pytest.mark.parametrize(("patience", "stops"), [(1, True), (2, True), (3, False)])
def test_training_stops_after_as_many_evaluations_as_patience_says(patience: int, stops: bool) -> None:
    said = io.StringIO()
    stopping = EarlyStopping(EarlyStoppingSection(patience=patience), Console(file=said, width=200))
    control = TrainerControl()
    stopping.on_evaluate(TrainingArguments(use_cpu=True), state_of(2.0, 1.0, 1.5, 1.25), control)
    assert control.should_training_stop == stops
    assert ("stopped early at step 40" in said.getvalue()) == stops
    assert ("lowest 1 at step 20" in (stopping.reason or "")) == stops
