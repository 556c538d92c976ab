"""The questions of a run's report: those of its settings, then some of its held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parley.config import RunConfig
from parley.data.conversation import Example, Message


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user turn, and the data set's own answer where it has one."""

    messages: list[Message]
    reference: str | None = None


def report_questions(config: RunConfig, heldout_examples: list[Example]) -> list[Question]:
    """`report.questions`, then up to `report.from_heldout` held-out rows that end with a question and an answer."""
    system = config.data.system
    system_turn: list[Message] = [{"role": "system", "content": system}] if system else []
    written = [Question([*system_turn, {"role": "user", "content": text}]) for text in config.report.questions]
    heldout = [question for question in map(last_question, heldout_examples) if question is not None]
    return written + heldout[: config.report.from_heldout]


def last_question(example: Example) -> Question | None:
    """The last question of an example, with its answer as the reference; None where it does not end with the two."""
    if isinstance(example.prompt, str):
        return Question([{"role": "user", "content": example.prompt}], str(example.completion))
    if isinstance(example.prompt, list):
        assert isinstance(example.completion, list)
        return Question(example.prompt, example.completion[0].get("content"))
    messages: list[dict[str, Any]] = example.messages or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        return None
    return Question(messages[:-1], messages[-1].get("content"))
