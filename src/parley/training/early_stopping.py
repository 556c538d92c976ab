"""Which evaluation was the best, and when to stop because held-out loss no longer falls.

Everything is computed from the trainer's own log history, which its checkpoints hold: a resumed run decides as an
undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.config import EarlyStoppingSection
from parley.text import print_text


class Evaluated(NamedTuple):
    """Held-out loss after a step, in nats per supervised token."""

    step: int
    loss: float


def evaluations(state: TrainerState) -> list[Evaluated]:
    """The evaluations since the first step, in their order; one that was repeated at a step counts once."""
    found = {}
    for entry in state.log_history:
        if "eval_loss" in entry and entry["step"] > 0:
            loss = entry["eval_loss"]
            found[int(entry["step"])] = float("nan") if loss is None else float(loss)
    return [Evaluated(step, loss) for step, loss in found.items()]


def lowest(evaluated: Sequence[Evaluated]) -> Evaluated | None:
    """The evaluation with the lowest finite loss, the first of equals; None where there is none."""
    return min((each for each in evaluated if isfinite(each.loss)), key=lambda each: each.loss, default=None)


def without_improvement(evaluated: Sequence[Evaluated], min_delta: float) -> int:
    """How many evaluations in a row, up to the last, were not lower by more than `min_delta` than the best before."""
    best, count = float("inf"), 0
    for each in evaluated:
        if each.loss < best - min_delta:  # False for a loss that is not a number
            best, count = each.loss, 0
        else:
            count += 1
    return count


class EarlyStopping(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a lower held-out loss. `reason`: why, once it did."""

    def __init__(self, settings: EarlyStoppingSection, console: Console) -> None:
        self.settings, self.console = settings, console
        self.reason: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state, control)  # a run resumed from the checkpoint at which it had stopped is over

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(state, control)

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        evaluated = evaluations(state)
        if without_improvement(evaluated, self.settings.min_delta) < self.settings.patience:
            return
        best = lowest(evaluated)
        at_best = f"; lowest {best.loss:.4g} at step {best.step}" if best else ""
        delta = f" by more than {self.settings.min_delta:g}" if self.settings.min_delta else ""
        times = f"{self.settings.patience} evaluations" if self.settings.patience > 1 else "one evaluation"
        self.reason = (
            f"stopped early at step {state.global_step}: held-out loss has not fallen{delta} in {times}{at_best}"
        )
        print_text(self.console, self.reason)
        control.should_training_stop = True
