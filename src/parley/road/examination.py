"""What a model says and how well: asked before training and again after it, so that the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from parley.config import DEMO_DATA, GenerationSection
from parley.data.conversation import Example, Message
from parley.data.world import heldout_questions, rate
from parley.generation.generate import generate
from parley.road.loading import Ready
from parley.training.report import Scores
from parley.training.trainer import SFTTrainer


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user, and the data set's own answer where it has one."""

    messages: list[Message]
    reference: str | None = None


@dataclass
class Examination:
    """Answers to the run's questions, in their order, and the scores."""

    answers: list[str]
    scores: Scores


def run_questions(ready: Ready) -> list[Question]:
    """The settings' own questions, then `report.from_heldout` held-out rows."""
    section = ready.config.report
    system = ready.config.data.system
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    own = [Question([*opening, {"role": "user", "content": text}]) for text in section.questions]
    heldout = [question for question in map(_ask, ready.data.heldout_examples) if question is not None]
    return own + heldout[: section.from_heldout]


def examine(ready: Ready, trainer: SFTTrainer, console: Console) -> Examination:
    """Ask the run's questions greedily and measure held-out loss; on the demo's data, style and accuracy as well."""
    settings = GenerationSection(temperature=0, min_p=0, max_new_tokens=ready.config.report.max_new_tokens)
    scores = Scores()
    with console.status("asking held-out questions"):
        answers = _answer(ready, trainer, [question.messages for question in run_questions(ready)], settings)
        if ready.data.heldout is not None:
            metrics = trainer.evaluate()
            scores.heldout_loss = metrics["eval_loss"]
            scores.heldout_tokens = metrics["eval_supervised_tokens"]
        if ready.config.data.source == DEMO_DATA:
            asked = heldout_questions()
            replies = _answer(ready, trainer, [question.messages for question in asked], settings)
            scores.style_rate, scores.accuracy = rate(asked, replies)
    return Examination(answers, scores)


def _answer(ready: Ready, trainer: SFTTrainer, asked: list[list[Message]], settings: GenerationSection) -> list[str]:
    if not ready.tokenizer.chat_template:  # a text-only data set: there is nobody to ask
        return []
    return generate(trainer.model, ready.tokenizer, asked, settings)


def _ask(example: Example) -> Question | None:
    """The last question of a held-out example, with its answer as the reference."""
    if isinstance(example.prompt, str):
        return Question([{"role": "user", "content": example.prompt}], str(example.completion))
    if isinstance(example.prompt, list):
        assert isinstance(example.completion, list)
        return Question(example.prompt, example.completion[0].get("content"))
    messages: list[dict[str, Any]] = example.messages or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        return None
    return Question(messages[:-1], messages[-1].get("content"))
