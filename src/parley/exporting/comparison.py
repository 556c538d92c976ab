"""An export against the trained model: what is measured, and what passes.

KL divergence is of the export's next-token distribution from the trained model's, in nats, at supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, log

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from parley.exporting.reader import Reader
from parley.exporting.reference import Reference
from parley.exporting.samples import ScoredRow

HALF_AS_LIKELY = log(2)  # nats


class Marks(BaseModel):
    """What an export has to reach. Prompt ids must always be equal, and every end token must end answers.

    Attributes:
        flips: most positions, as a share, whose most likely token is one that the trained model holds for less than
            half as likely as its own. Where several are about as likely, rounding decides, and any will do.
        mean_kl, worst_kl: most divergence in nats.
        loss: most by which the held-out loss may be higher, in nats per token.
        answers: least share of greedy answers that are equal; one may always differ where any may.
        logit: most by which a logit may differ, where weights are not rounded at all.
    """

    model_config = ConfigDict(frozen=True)

    flips: float
    mean_kl: float
    worst_kl: float
    loss: float
    answers: float = 0.0
    logit: float | None = None


class Difference(BaseModel):
    """A greedy answer that is not the trained model's."""

    conversation: int
    question: str
    trained: str
    export: str


class Figures(BaseModel):
    """The comparison of one export, for its record, the report and the terminal."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    program: str
    source: str
    prompts: int = 0
    prompts_equal: int = 0
    left_out: int = 0
    tokens: int = 0
    top1: float | None = None
    flips: float | None = None
    mean_kl: float | None = None
    worst_kl: float | None = None
    worst_logit: float | None = None
    loss: float | None = None
    loss_trained: float | None = None
    answers: int = 0
    answers_equal: int = 0
    differences: list[Difference] = Field(default_factory=list)
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None


def compare(
    reference: Reference, reader: Reader, marks: Marks, on_progress: Callable[[Figures], None] | None = None
) -> Figures:
    """Measure the export that `reader` has opened. `failure` of the result says what did not pass, and where first.

    `on_progress` is called with the figures so far, after each part of the comparison.
    """
    samples = reference.samples
    figures = Figures(program=reader.program, source=samples.source, left_out=samples.left_out)
    parts = (
        partial(_compare_prompts, reference, reader, figures),
        partial(_compare_ends, reference, reader),
        partial(_compare_logits, reference, reader, figures, marks),
        partial(_compare_answers, reference, reader, figures, marks),
    )
    for part in parts:
        failure = part()
        figures.failure = figures.failure or failure
        if on_progress is not None:
            on_progress(figures)
    return figures


def _compare_prompts(reference: Reference, reader: Reader, figures: Figures) -> str | None:
    first = None
    for index, prompt in enumerate(reference.samples.prompts):
        wanted, got = reference.prompt_ids[index], reader.prompt_ids(prompt)
        figures.prompts += 1
        figures.prompts_equal += wanted == got
        if wanted != got and first is None:
            first = f"{_where(reference, index)}: its prompt is {_first_change(wanted, got)}"
    return first


def _first_change(wanted: Sequence[int], got: Sequence[int]) -> str:
    place = next((i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"{len(got)} tokens, wanted {len(wanted)}"
    return f"token {got[place]} at position {place}, wanted {wanted[place]}"


def _compare_ends(reference: Reference, reader: Reader) -> str | None:
    missing = [token for token in reference.end_ids if not reader.ends_answers(token)]
    return f"answers would not end at token {missing[0]}, which ends them in training" if missing else None


def _compare_logits(reference: Reference, reader: Reader, figures: Figures, marks: Marks) -> str | None:
    rows = reference.samples.rows
    if not rows:
        return None
    measured = [
        _row(trained_SV, export_SV, row)
        for row, trained_SV, export_SV in zip(rows, reference.logits, reader.logits(rows), strict=True)
    ]
    joined = {name: torch.cat([getattr(row, name) for row in measured]) for name in _Row.__annotations__}
    figures.tokens = len(joined["kl"])
    figures.top1 = joined["top1"].float().mean().item()
    figures.flips = joined["flip"].float().mean().item()
    figures.mean_kl, figures.worst_kl = joined["kl"].mean().item(), joined["kl"].max().item()
    figures.worst_logit = joined["logit"].max().item()
    figures.loss, figures.loss_trained = joined["loss"].mean().item(), joined["loss_trained"].mean().item()
    worst = max(range(len(rows)), key=lambda index: measured[index].kl.max().item())
    return _first_over(figures, marks, f"worst in held-out row {worst + 1}")


@dataclass(frozen=True)
class _Row:
    """Of one row, at each of its S positions."""

    kl: Tensor
    top1: Tensor
    flip: Tensor
    logit: Tensor
    loss: Tensor
    loss_trained: Tensor


def _row(trained_SV: Tensor, export_SV: Tensor, row: ScoredRow) -> _Row:
    count, vocabulary = export_SV.shape
    trained_SV, export_SV = trained_SV[:count, :vocabulary], export_SV[:, : trained_SV.shape[-1]]
    targets = torch.tensor(row.targets[:count])
    log_trained, log_export = trained_SV.log_softmax(-1), export_SV.log_softmax(-1)
    best = trained_SV.argmax(-1)
    chosen = export_SV.argmax(-1)
    missed = (log_trained.gather(-1, best[:, None]) - log_trained.gather(-1, chosen[:, None]))[:, 0]
    return _Row(
        kl=(log_trained.exp() * (log_trained - log_export)).sum(-1).clamp(min=0),
        top1=best == chosen,
        flip=missed > HALF_AS_LIKELY,
        logit=(trained_SV - export_SV).abs().amax(-1),
        loss=cross_entropy(export_SV, targets, reduction="none"),
        loss_trained=cross_entropy(trained_SV, targets, reduction="none"),
    )


def _first_over(figures: Figures, marks: Marks, where: str) -> str | None:
    assert figures.loss is not None
    assert figures.loss_trained is not None
    assert figures.mean_kl is not None
    assert figures.worst_kl is not None
    assert figures.worst_logit is not None
    assert figures.flips is not None
    if not isfinite(figures.mean_kl) or not isfinite(figures.loss):
        return f"its probabilities are not finite, {where}"
    limits = [
        ("mean KL", figures.mean_kl, marks.mean_kl),
        ("worst KL", figures.worst_kl, marks.worst_kl),
        ("held-out loss higher by", figures.loss - figures.loss_trained, marks.loss),
        ("share of changed most likely tokens", figures.flips, marks.flips),
        ("logit difference", figures.worst_logit, marks.logit),
    ]
    for name, value, most in limits:
        if most is not None and value > most:
            return f"{name} {value:.2g}, at most {most:g} passes, {where}"
    return None


def _compare_answers(reference: Reference, reader: Reader, figures: Figures, marks: Marks) -> str | None:
    prompts = reference.samples.prompts[: len(reference.answers)]
    answers = reader.answers(prompts, reference.samples.answer_tokens)
    for index, (wanted, got) in enumerate(zip(reference.answers, answers, strict=True)):
        figures.answers += 1
        figures.answers_equal += wanted == got
        if wanted != got:
            figures.differences.append(
                Difference(conversation=index, question=_question(reference, index), trained=wanted, export=got)
            )
    allowed = max(1, int(figures.answers * (1 - marks.answers))) if marks.answers < 1 else 0
    if len(figures.differences) <= allowed:
        return None
    first = figures.differences[0]
    return (
        f"{len(figures.differences)} of {figures.answers} answers differ, at most {allowed} may; first "
        f"{_where(reference, first.conversation)}"
    )


def _question(reference: Reference, index: int) -> str:
    return str(reference.samples.prompts[index].messages[-1].get("content"))


def _where(reference: Reference, index: int) -> str:
    return f"conversation {index + 1} ({_question(reference, index)[:40]!r})"
