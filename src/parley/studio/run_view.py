"""What the page of a run says in words: its state, its sample answers, and its steps that need a look."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from parley.evaluation.report_events import add_answers_of_events, add_step_faults
from parley.studio.i18n import N_
from parley.studio.run_events import COLUMNS, REWARD_COLUMNS, EventBatch, read_batch
from parley.training.report import Answer, FaultRow, Report, answer_runs, fault_rows
from parley.training.run_outcome import OUTCOMES
from parley.training.run_summary import RunSummary


@dataclass
class Sample:
    """A question of the report, and its answers with the steps they were given at: before, during and after."""

    question: list[tuple[str, str]]
    answers: list[tuple[str, str]]
    reference: str | None


@dataclass
class RunView:
    """The run in `path` as far as its events were `add`ed."""

    REWARDS: ClassVar[dict[str, str]] = {
        "preference_accuracy": N_("Preference accuracy"),
        "rewards/margins": N_("Reward margin"),
        "reward": N_("Reward"),
        "kl": N_("Divergence"),
    }
    """Figures of the last step of a preference run or GRPO that are said in words, with their names."""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    point: list[float | None] | None = None
    first: list[float | None] | None = None  # of this process: the rate of steps is that since then
    outcome: dict[str, Any] | None = None  # the event that says how the run ended

    def add(self, batch: EventBatch) -> None:
        if batch.restarted:
            self.events, self.point, self.first, self.outcome = [], None, None, None
        self.events += [event for event in batch.others if event.get("event") in ("answers", "spike", "nonfinite")]
        for event in batch.others:
            if event.get("event") == "start":
                self.first, self.outcome = None, None
            elif event.get("event") in OUTCOMES:
                self.outcome = event
        if batch.points:
            self.point = batch.points[-1]
            self.first = self.first or batch.points[0]

    def read(self, until: int | None = None) -> None:
        """Add all events, of the steps the last ones, up to the offset `until` of the log, which is a position's."""
        log, position = self.path / "events.jsonl", None
        if until is None:
            until = log.stat().st_size if log.is_file() else 0
        while (batch := read_batch(log, position, until=until)) is not None:
            self.add(batch)
            position = batch.position

    @property
    def rewards(self) -> dict[str, float | None]:
        """The last step's REWARD_COLUMNS; empty for a supervised run."""
        return dict(zip(REWARD_COLUMNS, (self.point or [])[len(COLUMNS) :], strict=False))

    def seconds_left(self, run: RunSummary) -> float | None:
        """By the mean rate of the steps since the process began."""
        if run.state != "running" or not run.max_steps or self.point is None or self.first is None:
            return None
        at = COLUMNS.index("seconds")
        first_step, first_seconds, step, seconds = self.first[0], self.first[at], self.point[0], self.point[at]
        if step is None or first_step is None or seconds is None or first_seconds is None or step <= first_step:
            return None
        return (seconds - first_seconds) / (step - first_step) * (run.max_steps - step)

    def failure(self, run: RunSummary) -> str | None:
        """Why a run failed: its message, "" where its process left none; None where it did not, or nothing was read."""
        if run.state != "failed" or (self.point is None and self.outcome is None):
            return None
        return "" if self.outcome is None else str(self.outcome.get("message") or "") or None

    def evaluates(self, run: RunSummary) -> bool:
        """Whether it evaluates during training, and so answers its questions then."""
        training = run.settings.get("training")
        return isinstance(training, dict) and training.get("eval_steps") is not None

    def samples(self, run: RunSummary) -> list[Sample]:
        """Of the report, which is written before the first step, and of the events since."""
        answers = run.report.get("answers")
        found = []
        for value in answers if isinstance(answers, list) else []:
            try:  # the folder may be a stranger's, or of another version
                found.append(Answer.model_validate(value))
            except ValidationError:
                return []
        report = Report(title="", answers=found)
        add_answers_of_events(report, self.events)
        return [_sample(answer) for answer in report.answers]

    def faults(self) -> list[FaultRow]:
        report = Report(title="")
        add_step_faults(report, self.events)
        return fault_rows(report.step_faults)


def _sample(answer: Answer) -> Sample:
    if isinstance(answer.question, str):
        question = [("user", answer.question)]
    else:
        question = [(turn.role, turn.content or "") for turn in answer.question]
    answers = [("before", answer.before)] if answer.before is not None else []
    answers += [(run.steps, run.text) for run in answer_runs(answer)]
    if answer.after is not None:
        answers.append(("after", answer.after))
    return Sample(question, answers, answer.reference)
