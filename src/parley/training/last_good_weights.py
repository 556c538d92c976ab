"""The adapter as it was at the start and at the last checkpoints and evaluations, in host memory.

A step whose loss is not finite may have weights that an earlier update ruined, though every number in them is finite: a
learning rate of 1e30 does that. Then the newest of these copies that still gives numbers is what a run saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.units import GIB

KEPT = 2  # besides the start: the newest may be ruined already
LARGEST = GIB  # of one copy; full fine-tuning has its checkpoints


class LastGoodWeights(TrainerCallback):
    """Copies of the trained parameters by the step they are of, oldest first."""

    def __init__(self) -> None:
        self.copies: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.copies.clear()
        self._copy(state.global_step, kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._copy(state.global_step, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.copies:  # an evaluation before training copies nothing
            self._copy(state.global_step, kwargs["model"])

    def restore(self, model: nn.Module, is_broken: Callable[[], bool]) -> int | None:
        """Load the newest copy with which `is_broken()` is False. Returns its step; None where there is none."""
        for step in reversed(self.copies):
            with torch.no_grad():
                for name, parameter in trained_parameters(model).items():
                    parameter.copy_(self.copies[step][name])
            if not is_broken():
                return step
        return None

    def _copy(self, step: int, model: nn.Module) -> None:
        trained = trained_parameters(model)
        sharded = any(isinstance(parameter, DTensor) for parameter in trained.values())
        if sharded or sum(parameter.nbytes for parameter in trained.values()) > LARGEST:
            return
        self.copies.pop(step, None)  # a step's copy is the newest, also where it replaces one
        self.copies[step] = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
        for old in list(self.copies)[1:-KEPT]:
            del self.copies[old]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
