"""Held-out loss and greedy answers of a model, measured in the same way before and after training."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from parley.config import DEMO_DATA, DEMO_PREFERENCES, DEMO_PROMPTS, GenerationSection
from parley.data.example import Message
from parley.data.messages import with_system
from parley.data.supervision import ControlText
from parley.evaluation.demo_scoring import heldout_questions, rate
from parley.evaluation.questions import Question
from parley.inference.generate import generate
from parley.inference.lockstep import generate_in_lockstep
from parley.models.sharding import is_sharded
from parley.training.check_settings import check_best_metric
from parley.training.fused_trainer import FusedTrainer
from parley.training.prepare_training import TrainingSetup
from parley.training.processes import from_all, process_count, process_rank
from parley.training.report import Scores

DEMO_SOURCES = (DEMO_DATA, DEMO_PREFERENCES, DEMO_PROMPTS)


@dataclass
class Evaluation:
    """Scores, and the answers to the report's questions in their order."""

    scores: Scores = field(default_factory=Scores)
    answers: list[str] = field(default_factory=list)


def evaluate_model(
    setup: TrainingSetup, trainer: FusedTrainer, questions: list[Question], console: Console
) -> Evaluation:
    """Held-out loss and answers of the model as it is now."""
    evaluation = Evaluation(heldout_scores(setup, trainer, console))
    answer_questions(evaluation, setup, questions, console)
    return evaluation


def heldout_scores(setup: TrainingSetup, trainer: FusedTrainer, console: Console) -> Scores:
    """Held-out loss in nats per supervised token; nothing without held-out rows."""
    if setup.data.heldout is None:
        return Scores()
    with console.status("measuring held-out loss"):
        metrics = trainer.evaluate()
    # The first evaluation comes before the first step, and shows which metrics there are.
    check_best_metric(trainer.args, metrics)
    if "eval_reward" in metrics:  # the loss of a policy gradient says nothing of the policy
        return Scores(reward=metrics["eval_reward"])
    return Scores(
        heldout_loss=metrics["eval_loss"],
        heldout_tokens=metrics["eval_supervised_tokens"],
        preference_accuracy=metrics.get("eval_preference_accuracy"),
    )


def answer_questions(
    evaluation: Evaluation, setup: TrainingSetup, questions: list[Question], console: Console, *, base: bool = False
) -> None:
    """Add greedy answers to `evaluation`, of the `base` model or of the adapter.

    The demo's answers are rated as well: its world knows which are right and which talk like a pirate.
    """
    with console.status("answering held-out questions"):
        evaluation.answers = _dealt_answers(setup, questions, base=base)
        if setup.config.data.source in DEMO_SOURCES and setup.tokenizer.chat_template:
            rated, system = heldout_questions(), setup.config.data.system
            answers = _generate(setup, [with_system(question.messages, system) for question in rated], base=base)
            evaluation.scores.style_rate, evaluation.scores.accuracy = rate(rated, answers)


def _dealt_answers(setup: TrainingSetup, questions: list[Question], *, base: bool) -> list[str]:
    """Each process answers every n-th question; all of them answer all, together, where the weights are sharded."""
    count, rank = process_count(), process_rank()
    if is_sharded(setup.model):
        return greedy_answers(setup, questions, base=base)
    own = greedy_answers(setup, questions[rank::count], base=base)
    shares = [iter(share) for share in from_all(own)]
    return [next(shares[index % count]) for index in range(len(questions))]


def greedy_answers(setup: TrainingSetup, questions: list[Question], *, base: bool = False) -> list[str]:
    """Answers of the `base` model or of the adapter as it is now."""
    prompts = [question.messages for question in questions]
    return _generate(setup, prompts, base=base, control_tokens=setup.config.data.control_tokens) if prompts else []


def _generate(
    setup: TrainingSetup, conversations: list[list[Message]], *, base: bool, control_tokens: ControlText = "auto"
) -> list[str]:
    make = generate_in_lockstep if is_sharded(setup.model) else generate
    return make(setup.model, setup.tokenizer, conversations, _greedy(setup), base=base, control_tokens=control_tokens)


def _greedy(setup: TrainingSetup) -> GenerationSection:
    """Settings with which only training can change an answer."""
    return GenerationSection(temperature=0, min_p=0, max_new_tokens=setup.config.report.max_new_tokens)
