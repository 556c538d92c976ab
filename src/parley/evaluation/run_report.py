"""The report of a run, assembled from its settings and its evaluations; report_events.py adds its event log."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice

from parley.config import DEMO_MODEL, RunConfig
from parley.data.preview import pieces
from parley.evaluation.evaluate_model import Evaluation
from parley.evaluation.questions import Question
from parley.training.prepare_training import TrainingSetup
from parley.training.report import Answer, MaskExample, Report
from parley.versions import library_versions


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
    """What run.yaml holds: for a run whose report.json is missing or broken."""
    return Report(**_headline(config), settings_yaml=config.to_yaml())


def add_evaluations(report: Report, before: Evaluation, after: Evaluation) -> None:
    """Scores, and the answers to the report's questions; answers that were not generated stay None."""
    report.before, report.after = before.scores, after.scores
    for index, answer in enumerate(report.answers):
        answer.before = before.answers[index] if before.answers else None
        answer.after = after.answers[index] if after.answers else None


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
