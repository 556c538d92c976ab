"""What a run's event log adds to its report. Imports no torch: pages watch runs with it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from parley.training.report import Report, SampledAnswer, StepAnswer, StepFault, StepFigures

# Keys of a `step` event, as the trainer logs them, by the report's own.
EVENT_KEYS = {
    "token_accuracy": "mean_token_accuracy",
    "completion_tokens": "completions/mean_length",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}
EVAL_KEYS = {
    "step": "step",
    "heldout_loss": "eval_loss",
    "heldout_reward": "eval_reward",
    "heldout_preference_accuracy": "eval_preference_accuracy",
}
MAX_SAMPLES = 24
"""Sampled answers of a report: those of the first events and of the last ones."""
MAX_SPIKES = 20
NOTED = ("out_of_memory", "nonfinite")  # events whose message is a note of the report


def add_events(report: Report, events: list[dict[str, Any]]) -> None:
    """All that events.jsonl says beside the figures of its steps."""
    add_event_notes(report, events)
    add_answers_of_events(report, events)
    add_step_faults(report, events)
    add_samples(report, events)


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
            left_out = "heldout_loss" if "eval_reward" in event else ""  # of a policy gradient it says nothing
            names = {name: key for name, key in EVAL_KEYS.items() if name != left_out}
        case "nonfinite":
            names = {"step": "step", "loss": "loss", "grad_norm": "grad_norm"}
        case _:
            return None
    return StepFigures.model_validate({name: event[key] for name, key in names.items() if key in event})


def add_samples(report: Report, events: Iterable[dict[str, Any]]) -> None:
    """The sampled answers of the `completions` events of events.jsonl."""
    found = []
    for event in events:
        samples = event.get("samples") if event.get("event") == "completions" else None
        for sample in samples if isinstance(samples, list) else []:
            with suppress(ValidationError, TypeError):  # a line may be a stranger's, or of another version
                found.append(SampledAnswer.model_validate({"step": event.get("step"), **sample}))
    half = MAX_SAMPLES // 2
    report.samples = found if len(found) <= MAX_SAMPLES else found[:half] + found[-half:]


def add_event_notes(report: Report, events: Iterable[dict[str, Any]]) -> None:
    """Note what the event log records beside figures: what memory or numbers did to steps."""
    for event in events:
        message = event.get("message")
        if event.get("event") in NOTED and isinstance(message, str) and message not in report.notes:
            report.notes.append(message)
