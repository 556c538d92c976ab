"""How often a run saves where `training.save_steps` is auto: as often as costs little.

A checkpoint of an adapter takes a fraction of a second, one of a whole model minutes, and steps take from 20 ms to
minutes. So a checkpoint is due every SAVE_STEPS steps, but only where saving takes at most SHARE of the time.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.training.processes import from_main

if TYPE_CHECKING:
    from parley.training.checkpointing_trainer import CheckpointingTrainer

SAVE_STEPS = 50
SHARE = 0.02


class SaveCadence(TrainerCallback):
    """Leaves a due checkpoint out while the last one took more than its share of the time since. Never the last."""

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer = trainer
        self._saved_at: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._saved_at is None or state.global_step >= state.max_steps or not control.should_save:
            return
        # Clocks differ between processes, which all save or none: the main one decides.
        control.should_save = from_main(perf_counter() - self._saved_at >= self.trainer.save_seconds / SHARE)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = perf_counter()
