"""Callbacks of a run's trainer: the event log (`events.jsonl`) and the progress line."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from parley.text import print_text
from parley.training.early_stopping import evaluations, lowest
from parley.training.json_lines import WEIGHTS, append_line, read_events, to_json
from parley.training.report import replace_file
from parley.training.resource_usage import memory_peak
from parley.training.run_outcome import OUTCOMES, process_identity

ENDS = ("end", *OUTCOMES)  # of a process, not of a run that continues


class EventLog(TrainerCallback):
    """One JSON object a line: `start` (of a process, after `step` where it resumes), `step` (a logged step), `eval`
    (held-out loss), `answers` (to the report's first questions, at an evaluation), `nonfinite` and `spike` (steps that
    need a look), `save` (a checkpoint), `end`, `weights` (adapter or model saved, of a run of so many steps).

    The last line says how the run ended (run_outcome.py). Each line is flushed, so that a run that is killed keeps its
    log. `seconds` counts from the start of training; `tokens_per_s` is the rate since the previous logged step; memory
    is the peak in GiB.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.events: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.seconds_before = 0.0  # of training, in the processes that a resumed run had before
        self.begun = False  # whether the trainer is set up
        self.steps_done = 0
        self._started = self._last_time = perf_counter()
        self._last_tokens = 0.0
        self.paused = 0.0
        self.kept_step: int | None = None  # whose weights are evaluated once training has ended

    def resume_after(self, step: int) -> None:
        """Continue the file of a run that is resumed from its checkpoint of `step`: later events are dropped."""
        events = read_events(self.path)
        saved = [i for i, event in enumerate(events) if (event["event"], event["step"]) == ("save", step)]
        # A run evaluates once more after its last checkpoint, at the same step.
        repeated = set(range(saved[-1] + 1, len(events))) if saved else set()
        found = [
            event
            for i, event in enumerate(events)
            # Weights that were saved stay in the folder until they are saved again, whatever their step.
            if event["event"] == WEIGHTS
            or (
                event["step"] <= step
                and event["event"] not in ENDS
                and not (i in repeated and event["event"] == "eval")
            )
        ]
        self.events, self.steps = found, [event for event in found if event["event"] == "step"]
        self.steps_done = step
        self.seconds_before = max((event.get("seconds", 0.0) for event in found), default=0.0)
        self._last_tokens = self.steps[-1]["num_tokens"] if self.steps else 0.0
        text = "".join(to_json(event) + "\n" for event in found)
        replace_file(self.path, text, f"parley train --resume {self.path.parent}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_time = perf_counter()  # an evaluation before training has its own clock
        self._started = self._last_time - self.seconds_before
        self.begun = True
        self.write({"event": "start", "step": state.global_step, "max_steps": state.max_steps, **process_identity()})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        now = perf_counter()
        event: dict[str, Any] = {
            "event": "end",
            "step": state.global_step,
            "seconds": now - self._started,
            **logs,
        }
        # transformers logs three kinds of figures through one hook and does not say which.
        if "eval_loss" in logs:
            event["event"] = "eval"
            event["step"] = state.global_step if self.kept_step is None else self.kept_step
            self.pause(logs.get("eval_runtime", 0.0))
        elif "learning_rate" in logs:  # and "loss", unless no step since the last log had a finite one
            event["event"] = "step"
            event["tokens_per_s"] = (logs["num_tokens"] - self._last_tokens) / (now - self._last_time)
            event["memory_gib"] = memory_peak(self.device)
            self._last_time, self._last_tokens = now, logs["num_tokens"]
            self.steps.append(event)
        self.write(event)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps_done = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.write({"event": "save", "step": state.global_step, "seconds": perf_counter() - self._started})

    def pause(self, seconds: float) -> None:
        """Leave `seconds`, in which nothing was trained, out of the rates of the steps."""
        if self.begun:
            self.paused += seconds
            self._last_time += seconds

    def write(self, event: dict[str, Any]) -> None:
        if event["event"] == "eval" and event["step"] == 0 and any(_same_place(event, other) for other in self.events):
            return  # before training: a resumed run measures again what its first process did
        self.events.append(event)
        append_line(self.path, event)


def _same_place(event: dict[str, Any], other: dict[str, Any]) -> bool:
    return (event["event"], event["step"]) == (other["event"], other["step"])


class ProgressLine(TrainerCallback):
    """A progress bar with loss, tokens/s, memory and time left; without a terminal, a line every tenth of the steps."""

    def __init__(self, console: Console, log: EventLog) -> None:
        self.console = console
        self.log = log
        self.progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # the bar gives way in 80 columns
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=None, figures="")
        self._next_line = 0
        self._heldout = ""
        self._training = False  # evaluations before and after training have no line here

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training = True
        self.progress.update(self.task, total=state.max_steps)
        self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._training and "eval_loss" in (logs or {}) and state.global_step > 0:
            self._show_heldout(state)
        if not self.log.steps or not self._training:  # a resumed run evaluates before it trains, with steps in its log
            return
        last = self.log.steps[-1]
        loss = f"loss {last['loss']:.3f}" if "loss" in last else "no finite loss"
        if "rewards/margins" in last:
            loss += f" · margin {last['rewards/margins']:.2f} · accuracy {last['rewards/accuracies']:.2f}"
        if "reward" in last:
            loss += f" · reward {last['reward']:.2f} · {last['completions/mean_length']:.0f} tokens an answer"
        if "rewards/margins" in last or "reward" in last:
            loss += f" · KL {last['kl']:.2f}" if "kl" in last else ""
        figures = f"{loss}{self._heldout} · {last['tokens_per_s']:,.0f} tokens/s"
        figures += f" · {last['memory_gib']:.2f} GiB"
        self.progress.update(self.task, completed=state.global_step, figures=figures)
        # A log file gets ten lines, not a bar drawn over itself.
        if not self.console.is_terminal and state.global_step >= self._next_line:
            self._next_line = state.global_step + max(1, state.max_steps // 10)
            print_text(self.console, f"step {state.global_step}/{state.max_steps} · {figures}")

    def _show_heldout(self, state: TrainerState) -> None:
        """A line for each evaluation, above the bar, and the latest loss in the bar itself."""
        evaluated = evaluations(state)
        best, last = lowest(evaluated), evaluated[-1]
        place = "the lowest so far" if best == last else f"lowest {best.loss:.3f} at step {best.step}" if best else ""
        print_text(
            self.progress.console, f"step {last.step}/{state.max_steps} · held-out loss {last.loss:.3f} · {place}"
        )
        self._heldout = f" · held-out {last.loss:.3f}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal; called after an interrupted run too."""
        self._training = False
        self.progress.stop()
