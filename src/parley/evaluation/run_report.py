"""The report of a run, assembled from its settings, its evaluations and its event log."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import Any

from parley.config import DEMO_MODEL, RunConfig
from parley.data.preview import pieces
from parley.evaluation.evaluation import Evaluation
from parley.evaluation.questions import report_questions
from parley.training.report import Answer, MaskExample, Report, StepFigures
from parley.training.setup import TrainingSetup
from parley.versions import library_versions


def assemble_report(
    setup: TrainingSetup, before: Evaluation, after: Evaluation, step_events: list[dict[str, Any]]
) -> Report:
    """Everything but resources and notes, which the training stage knows."""
    config = setup.config
    return Report(
        title=f"{config.model.name} on {config.data.source}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=config.model.name,
        data=config.data.source,
        before=before.scores,
        after=after.scores,
        answers=_answers(setup, before, after),
        steps=[step_figures(event) for event in step_events],
        data_summary=setup.data.summary.model_dump(mode="json"),
        data_lines=setup.data.summary.lines(),
        examples=_mask_examples(setup),
        settings_yaml=config.to_yaml(),
        versions=library_versions(),
        next_commands=next_commands(config),
    )


def step_figures(event: dict[str, Any]) -> StepFigures:
    """A `step` event of events.jsonl as a row of the report."""
    return StepFigures(
        step=event["step"],
        loss=event["loss"],
        learning_rate=event["learning_rate"],
        grad_norm=event.get("grad_norm"),  # transformers leaves it out where nothing was clipped
        tokens_per_s=event["tokens_per_s"],
        memory_gib=event["memory_gib"],
        token_accuracy=event["mean_token_accuracy"],
        seconds=event["seconds"],
    )


def next_commands(config: RunConfig) -> list[str]:
    chat = f"parley chat {config.output}"
    if config.model.name == DEMO_MODEL:
        return [chat, "parley train --model meta-llama/Llama-3.2-1B-Instruct --data your-conversations.jsonl"]
    return [chat, f"parley eval {config.output}"]


def _answers(setup: TrainingSetup, before: Evaluation, after: Evaluation) -> list[Answer]:
    questions = report_questions(setup.config, setup.data.heldout_examples)
    return [
        Answer(question=question.messages, before=old, after=new, reference=question.reference)
        for question, old, new in zip(questions, before.answers, after.answers, strict=False)
    ]


def _mask_examples(setup: TrainingSetup) -> list[MaskExample]:
    found = []
    for origin, rendered in islice(
        zip(setup.data.preview_origins, setup.data.preview, strict=True), setup.config.report.examples
    ):
        runs = [(piece.text, piece.supervised) for piece in pieces(setup.tokenizer, rendered)]
        found.append(MaskExample(origin=origin, pieces=runs))
    return found
