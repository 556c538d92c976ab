"""What a model says and how well, before training and after it, so that the two can be compared.

An adapter that starts at nothing is switched off for the answers before training, which can then be asked for
afterwards: training begins sooner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from parley.config import DEMO_DATA, GenerationSection
from parley.data.conversation import Example, Message
from parley.evaluation.demo_scoring import heldout_questions, rate
from parley.inference.generate import generate
from parley.training.report import Scores
from parley.training.setup import Ready
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
    """Measure held-out loss and ask questions."""
    examination = measure(ready, trainer, console)
    ask(examination, ready, trainer, console)
    return examination


def measure(ready: Ready, trainer: SFTTrainer, console: Console) -> Examination:
    """Held-out loss, without answers."""
    scores = Scores()
    if ready.data.heldout is not None:
        with console.status("measuring held-out loss"):
            metrics = trainer.evaluate()
        scores.heldout_loss = metrics["eval_loss"]
        scores.heldout_tokens = metrics["eval_supervised_tokens"]
    return Examination([], scores)


def ask(examination: Examination, ready: Ready, trainer: SFTTrainer, console: Console, *, base: bool = False) -> None:
    """Ask the run's questions greedily, of the `base` or with the adapter; on the demo's data, rate the answers too."""
    settings = GenerationSection(temperature=0, min_p=0, max_new_tokens=ready.config.report.max_new_tokens)
    if not ready.tokenizer.chat_template:  # a text-only data set: there is nobody to ask
        return
    questions = [question.messages for question in run_questions(ready)]
    with console.status("asking held-out questions"):
        examination.answers = generate(trainer.model, ready.tokenizer, questions, settings, base=base)
        if ready.config.data.source == DEMO_DATA:
            asked = heldout_questions()
            replies = generate(trainer.model, ready.tokenizer, [one.messages for one in asked], settings, base=base)
            examination.scores.style_rate, examination.scores.accuracy = rate(asked, replies)


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
