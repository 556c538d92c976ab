"""The report of a run, assembled from its settings, its evaluations and its event log."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pydantic import ValidationError

from parley.config import DEMO_MODEL, RunConfig
from parley.data.preview import pieces
from parley.evaluation.evaluate_model import Evaluation
from parley.evaluation.questions import Question
from parley.training.prepare_training import TrainingSetup
from parley.training.report import Answer, MaskExample, Report, StepAnswer, StepFault, StepFigures
from parley.versions import library_versions

# Keys of a `step` event, as the trainer logs them, by the report's own.
EVENT_KEYS = {"token_accuracy": "mean_token_accuracy"}
MAX_SPIKES = 20
NOTED = ("out_of_memory", "nonfinite")  # events whose message is a note of the report


def begin_report(setup: TrainingSetup, questions: list[Question], notes: list[str]) -> Report:
    """What is known before the first step: settings, data, questions and versions."""
    return Report(
        **_headline(setup.config),
        data_summary=setup.data.summary.model_dump(mode="json"),
        data_lines=setup.data.summary.lines(),
        diagnosis=setup.data.diagnosis,
        answers=[Answer(question=question.messages, reference=question.reference) for question in questions],
        examples=_mask_examples(setup),
        settings_yaml=setup.config.to_yaml(),
        versions=library_versions(),
        notes=list(notes),
    )


def report_of_settings(config: RunConfig) -> Report:
    """All that run.yaml tells: for a run whose report.json is missing or broken."""
    return Report(**_headline(config), settings_yaml=config.to_yaml())


def add_evaluations(report: Report, before: Evaluation, after: Evaluation) -> None:
    """Scores, and the answers to the report's questions; answers that were not generated stay None."""
    report.before, report.after = before.scores, after.scores
    for index, answer in enumerate(report.answers):
        answer.before = before.answers[index] if before.answers else None
        answer.after = after.answers[index] if after.answers else None


def add_answers_of_events(report: Report, events: Iterable[dict[str, Any]]) -> None:
    """The `answers` events of events.jsonl, in the order of the report's questions."""
    for event in events:
        answers = event.get("answers") if event.get("event") == "answers" else None
        for answer, text in zip(report.answers, answers if isinstance(answers, list) else [], strict=False):
            if isinstance(text, str) and event["step"] not in [each.step for each in answer.during]:
                answer.during.append(StepAnswer(step=event["step"], text=text))


def add_step_faults(report: Report, events: Iterable[dict[str, Any]]) -> None:
    """The `nonfinite` and `spike` events of events.jsonl: all of the former, the highest MAX_SPIKES of the latter."""
    found = []
    for event in events:
        if event.get("event") in ("nonfinite", "spike"):
            values = {name: event.get(name) for name in ("step", "loss", "typical", "rows")}
            with suppress(ValidationError):  # a line may be a stranger's, or of another version
                found.append(StepFault.model_validate(values | {"kind": event["event"]}))
    spikes = sorted((f for f in found if f.kind == "spike"), key=_height, reverse=True)[:MAX_SPIKES]
    kept = [fault for fault in found if fault.kind == "nonfinite"] + spikes
    if kept:
        report.step_faults = sorted({fault.step: fault for fault in kept}.values(), key=lambda fault: fault.step)


def _height(fault: StepFault) -> float:
    return (fault.loss or 0.0) - (fault.typical or 0.0)


def steps_of_events(events: Iterable[dict[str, Any]]) -> list[StepFigures]:
    """The `step`, `eval` and `nonfinite` events of events.jsonl as rows of the report, one for each step.

    Events of other kinds, and those that are not what the event log writes, are left out.
    """
    steps: dict[int, StepFigures] = {}
    # A skipped step is logged without a loss, or with that of its neighbours: what it is is said last.
    for event in sorted(events, key=lambda event: event.get("event") == "nonfinite"):
        try:  # a line may be a stranger's, or of another version
            figures = _figures_of(event)
        except ValidationError:
            continue
        if figures is not None:
            known = steps.setdefault(figures.step, figures)
            for name in figures.model_fields_set:
                setattr(known, name, getattr(figures, name))
    return sorted(steps.values(), key=lambda row: row.step)


def _figures_of(event: dict[str, Any]) -> StepFigures | None:
    """What an event says of its step; None where it says no figures. Raises ValidationError."""
    match event.get("event"):
        case "step":
            names = {name: EVENT_KEYS.get(name, name) for name in StepFigures.model_fields}
        case "eval" if event.get("step"):
            names = {"step": "step", "heldout_loss": "eval_loss"}
        case "nonfinite":
            names = {"step": "step", "loss": "loss", "grad_norm": "grad_norm"}
        case _:
            return None
    return StepFigures.model_validate({name: event[key] for name, key in names.items() if key in event})


def add_event_notes(report: Report, events: Iterable[dict[str, Any]]) -> None:
    """Note what the event log records beside figures: what memory or numbers did to steps."""
    for event in events:
        message = event.get("message")
        if (
            event.get("event") in ("out_of_memory", "nonfinite")
            and isinstance(message, str)
            and message not in report.notes
        ):
            report.notes.append(message)


def next_commands(config: RunConfig) -> list[str]:
    chat = f"parley chat {config.output}"
    if config.model.name == DEMO_MODEL:
        return [chat, "parley train --model meta-llama/Llama-3.2-1B-Instruct --data your-conversations.jsonl"]
    # The demo's scores are in its report already; own data is worth another look.
    return [chat, f"parley eval {config.output}"]


def _headline(config: RunConfig) -> dict[str, str]:
    return {
        "title": f"{config.model.name} on {config.data.source}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": config.model.name,
        "data": config.data.source,
    }


def _mask_examples(setup: TrainingSetup) -> list[MaskExample]:
    found = []
    for origin, rendered in islice(
        zip(setup.data.preview_origins, setup.data.preview, strict=True), setup.config.report.examples
    ):
        runs = [(piece.text, piece.supervised) for piece in pieces(setup.tokenizer, rendered)]
        found.append(MaskExample(origin=origin, pieces=runs))
    return found
