"""When the host reads what became of the steps: with each log, checkpoint and evaluation, and at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.models.load import check_finite

if TYPE_CHECKING:
    from parley.training.packed_trainer import PackedTrainer


class StepChecks(TrainerCallback):
    """Calls the trainer's `check_steps` before anything of the steps is kept."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises ModelError for weights that are not finite."""
        if model is not None and self.trainer.runs_alone:  # a shard's sum is no tensor of this process
            check_finite(self.trainer.model.config.name_or_path or "the model", model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        read_anyway = control.should_log or control.should_save or control.should_evaluate
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if read_anyway or ends or self.trainer.monitor.is_full:
            self.trainer.check_steps()
