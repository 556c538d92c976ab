"""What an export is compared on: the run's own held-out rows, as far as the size of the model leaves time for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parley.config import DEMO_DATA
from parley.data.control_tokens import IGNORE_INDEX, control_tokens
from parley.data.example import Example, Message
from parley.data.golden import CONVERSATIONS
from parley.data.preferences import Kind, prepare_preferences
from parley.data.prepare import Prepared, prepare
from parley.data.render import render, render_prompt
from parley.errors import DataError, ParleyError
from parley.evaluation.demo_scoring import heldout_questions
from parley.evaluation.questions import last_question
from parley.exporting.trained_model import TrainedModel

SCORED_WORK = 4e11
"""Parameters times tokens that are scored: about 15 s of float32 on two cores."""
ANSWER_WORK = 8e10
"""Parameters times tokens that are generated."""
LEAST_SCORED, LEAST_ANSWERED = 256, 64  # tokens, however large the model is
MOST_ANSWERS, LEAST_ANSWERS = 100, 4
ANSWER_TOKENS = (16, 64)  # of one answer


@dataclass(frozen=True)
class ScoredRow:
    """A held-out row of L tokens; `positions` are those whose next token is supervised."""

    input_ids: list[int]
    positions: list[int]

    @property
    def targets(self) -> list[int]:
        return [self.input_ids[position + 1] for position in self.positions]


@dataclass(frozen=True)
class Prompt:
    """A conversation that the assistant is to continue, and the tools that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @cached_property
    def as_json(self) -> dict[str, Any]:
        """As clients send it: what a tool is called with is text."""
        messages = [dict(message) for message in self.messages]
        for message in messages:
            if message.get("tool_calls"):
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        return {"messages": messages} | ({"tools": self.tools} if self.tools else {})


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": text}}


@dataclass(frozen=True)
class Samples:
    """`source` names where they are from; `left_out` counts conversations that no text-based reader could match."""

    source: str
    prompts: list[Prompt]
    rows: list[ScoredRow]
    answer_count: int
    answer_tokens: int
    left_out: int = 0


def verification_samples(trained: TrainedModel, parameters: int) -> Samples:
    """Held-out prompts and rows of `trained`'s run, within the work that a model of `parameters` allows.

    Where the run's data is gone, the golden conversations are used, and `source` says so.
    """
    source, prompts, rows = _heldout(trained)
    if trained.settings.data.source == DEMO_DATA and trained.tokenizer.chat_template:
        prompts = [Prompt(question.messages) for question in heldout_questions()] + prompts
    control = control_tokens(trained.tokenizer).pattern
    comparable = [prompt for prompt in prompts if not control.search(str(prompt))]
    tokens = max(LEAST_ANSWERED, int(ANSWER_WORK / parameters))
    answers = min(MOST_ANSWERS, len(comparable), max(LEAST_ANSWERS, tokens // ANSWER_TOKENS[1]))
    length = min(ANSWER_TOKENS[1], max(ANSWER_TOKENS[0], tokens // max(1, answers)))
    if answers < min(MOST_ANSWERS, len(comparable)):  # a large model's time is spent on answers, not on long prompts
        comparable.sort(key=lambda prompt: len(str(prompt)))
    rows = _limited(rows, max(LEAST_SCORED, int(SCORED_WORK / parameters)))
    return Samples(source, comparable, rows, answers, length, len(prompts) - len(comparable))


def _heldout(trained: TrainedModel) -> tuple[str, list[Prompt], list[ScoredRow]]:
    tokenizer = trained.tokenizer
    try:
        prepared = _prepared(trained)
    except DataError as error:
        trained.notes.append(f"compared on the golden conversations, as the run's data cannot be read: {error}")
        return "golden conversations", *_golden(trained)
    if prepared.heldout is None:
        trained.notes.append("compared on the golden conversations, as the run kept no held-out rows")
        return "golden conversations", *_golden(trained)
    # Of a pair the chosen answer is what the model learned to give.
    side = "chosen_" if "chosen_input_ids" in prepared.heldout.column_names else ""
    rows = [_scored(row[f"{side}input_ids"], row[f"{side}labels"]) for row in prepared.heldout]
    found = [_prompt(example) for example in prepared.heldout_examples] if tokenizer.chat_template else []
    prompts = [prompt for prompt in found if prompt is not None and _renders(trained, prompt)]
    return "held-out conversations", prompts, [row for row in rows if row.positions]


def _prompt(example: Example) -> Prompt | None:
    """An example without its last answer; None where it has none, or settings of the template for this row alone."""
    if example.template:
        return None
    messages = example.messages or []
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        return Prompt(messages[:-1], example.tools)
    question = last_question(example)
    return None if question is None else Prompt(question.messages, example.tools)


def _prepared(trained: TrainedModel) -> Prepared:
    settings = trained.settings
    if settings.training.method == "sft":
        return prepare(settings.data, trained.tokenizer, settings.model.max_seq_length)
    kind: Kind = "labelled" if settings.training.method == "kto" else "pairs"
    return prepare_preferences(settings.data, trained.tokenizer, settings.model.max_seq_length, kind)


def _golden(trained: TrainedModel) -> tuple[list[Prompt], list[ScoredRow]]:
    if not trained.tokenizer.chat_template:
        raise DataError(f"{trained.folder.path}: no held-out rows and no chat template to verify with; add --no-verify")
    prompts, rows = [], []
    for messages in CONVERSATIONS:
        without_system = [message for message in messages if message["role"] != "system"]
        prompt = Prompt(without_system[:-1])
        if _renders(trained, prompt):
            prompts.append(prompt)
            rendered = render(trained.tokenizer, without_system)
            labels = [
                token if kept else IGNORE_INDEX for token, kept in zip(rendered.input_ids, rendered.mask, strict=True)
            ]
            rows.append(_scored(rendered.input_ids, labels))
    return prompts, rows


def _renders(trained: TrainedModel, prompt: Prompt) -> bool:
    try:
        return bool(render_prompt(trained.tokenizer, prompt.messages, prompt.tools))
    except ParleyError:
        return False


def _scored(input_ids: list[int], labels: list[int]) -> ScoredRow:
    positions = [i - 1 for i, label in enumerate(labels) if label != IGNORE_INDEX and i > 0]
    return ScoredRow(list(input_ids), positions)


def _limited(rows: list[ScoredRow], tokens: int) -> list[ScoredRow]:
    """The first rows of at most `tokens` tokens together; the first one is cut where it is longer alone."""
    kept: list[ScoredRow] = []
    for row in rows:
        used = sum(len(other.input_ids) for other in kept)
        if used + len(row.input_ids) <= tokens:
            kept.append(row)
        elif not kept:
            positions = [position for position in row.positions if position + 1 < tokens]
            kept.append(ScoredRow(row.input_ids[:tokens], positions))
        if used >= tokens:
            break
    return [row for row in kept if row.positions]
