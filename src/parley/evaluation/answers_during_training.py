"""The first questions of the report, answered by the adapter of each evaluation during training."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.evaluation.evaluate_model import greedy_answers
from parley.evaluation.questions import Question
from parley.models.sharding import is_sharded
from parley.text import print_text
from parley.training.callbacks import EventLog
from parley.training.prepare_training import TrainingSetup
from parley.training.resource_usage import release_cached_memory


class AnswersDuringTraining(TrainerCallback):
    """Writes an event `answers`, with the answers in the questions' order, after each evaluation."""

    def __init__(self, setup: TrainingSetup, questions: list[Question], log: EventLog, console: Console) -> None:
        self.setup, self.log, self.console = setup, log, console
        self.questions = questions[: setup.config.report.during_training]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        together = state.is_world_process_zero or is_sharded(self.setup.model)
        if not self.questions or state.global_step == 0 or not together:
            return
        started = perf_counter()
        try:
            answers = greedy_answers(self.setup, self.questions)
        except torch.OutOfMemoryError:  # training continues: the answers are only shown
            self.questions = []
            print_text(self.console, "no memory to answer questions during training; lower report.during_training")
            return
        finally:
            release_cached_memory(self.setup.device)
            self.log.pause(perf_counter() - started)
        self.log.write({"event": "answers", "step": state.global_step, "answers": answers})
