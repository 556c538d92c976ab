"""The questions of a run's report: those of its settings, then some of its held-out rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from parley.config import RunConfig
from parley.data.example import Example, Message
from parley.data.render import render_prompt
from parley.errors import DataError, ParleyError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user turn, and the data set's own answer where it has one."""

    messages: list[Message]
    reference: str | None = None


def report_questions(
    config: RunConfig, heldout_examples: list[Example], tokenizer: Any, context: int | None
) -> list[Question]:
    """`report.questions`, then up to `report.from_heldout` held-out rows that end with a question and an answer.

    All of them can be answered: a written question that the template refuses, or that fills the model's `context` (in
    tokens), is an error now and not after training; held-out rows of that kind are left out. None without a template.

    Raises UsageError.
    """
    if not tokenizer.chat_template:  # a model trained on plain text has no turns to answer
        return []
    system = config.data.system
    system_turn: list[Message] = [{"role": "system", "content": system}] if system else []
    written = [Question([*system_turn, {"role": "user", "content": text}]) for text in config.report.questions]
    # Checked before training: after it, a refusal would cost the report.
    for text, written_question in zip(config.report.questions, written, strict=True):
        try:
            _check_answerable(written_question, tokenizer, context)
        except ParleyError as error:
            raise UsageError(f"report.questions: {text[:40]!r}: {error}") from None
    heldout: list[Question] = []
    # Not all are rendered: a data set may hold out thousands, and a handful is shown.
    for example in heldout_examples:
        if len(heldout) == config.report.from_heldout:
            break
        question = last_question(example)
        if question is not None and _is_answerable(question, tokenizer, context):
            heldout.append(question)
    return written + heldout


def last_question(example: Example) -> Question | None:
    """The last question of an example, with its answer as the reference; None where it does not end with the two."""
    if isinstance(example.prompt, str):
        return Question([{"role": "user", "content": example.prompt}], str(example.completion))
    if isinstance(example.prompt, list):
        assert isinstance(example.completion, list)
        return Question(example.prompt, example.completion[0].get("content"))
    messages: list[dict[str, Any]] = example.messages or []
    # A question must be followed by an answer of the data set, or there is nothing to compare with.
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        return None
    return Question(messages[:-1], messages[-1].get("content"))


def _is_answerable(question: Question, tokenizer: Any, context: int | None) -> bool:
    try:
        _check_answerable(question, tokenizer, context)
    except ParleyError as error:
        logger.debug("a held-out row is not asked in the report: %s", error)
        return False
    return True


def _check_answerable(question: Question, tokenizer: Any, context: int | None) -> None:
    if not question.messages:  # a row with an empty prompt trains, but some templates write nothing for it
        raise DataError("a conversation without a message")
    tokens = len(render_prompt(tokenizer, question.messages))
    if context is not None and tokens >= context:
        raise DataError(f"it is {tokens:,} tokens, and the model's context is {context:,}; shorten it")
