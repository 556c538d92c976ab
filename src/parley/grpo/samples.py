"""Sampled answers with their rewards, in the event log and so in the report."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.grpo.trainer import GRPOTrainer
from parley.library_compat.trl import latest_completions
from parley.rewards import text_of
from parley.training.callbacks import EventLog

SHOWN = 4
"""Answers of an event."""
EVENTS = 20
"""Events of a run, about."""


def add_sample_log(trainer: Trainer, log: EventLog) -> None:
    """Have a GRPO trainer's answers logged; other trainers sample none."""
    if isinstance(trainer, GRPOTrainer):
        trainer.add_callback(SampledAnswers(trainer, log))


class SampledAnswers(TrainerCallback):
    """Writes an event `completions` at the first step, and then so often that a run has about EVENTS of them.

    Its `samples` are of the last generation: prompt, completion, the weighted reward and the advantage.
    """

    def __init__(self, trainer: Trainer, log: EventLog) -> None:
        self.trainer, self.log = trainer, log
        self._next, self._written = 0, -1

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if not self.trainer.model.training or (state.global_step < self._next and not last):
            return
        samples = latest_completions(self.trainer)
        if not samples or state.global_step == self._written:  # Trainer logs once more at its end
            return
        self._written = state.global_step
        self._next = state.global_step + max(1, state.max_steps // EVENTS)
        # The best and the worst ones say what is learned.
        samples.sort(key=lambda sample: sample["reward"], reverse=True)
        shown = samples[: SHOWN // 2] + samples[-SHOWN // 2 :] if len(samples) > SHOWN else samples
        self.log.write({"event": "completions", "step": state.global_step, "samples": [_readable(s) for s in shown]})


def _readable(sample: dict[str, Any]) -> dict[str, Any]:
    prompt = sample["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(str(turn.get("content") or "") for turn in prompt if turn["role"] != "system")
    return sample | {"prompt": prompt, "completion": text_of(sample["completion"])}
