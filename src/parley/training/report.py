"""The report of a run: report.json with every figure, and report.html, one self-contained file.

`Report` is plain data; every field but the title is optional. In report.json a figure that is not finite is the string
"NaN" or "Infinity": that is valid JSON, differs from a figure that was never measured (null), and reads back as it was.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import groupby
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from parley.data.doctor.findings import Diagnosis
from parley.errors import RunError
from parley.training.charts import Chart, line_chart
from parley.training.formatting import Row, duration, figure, flat_rows, gib, percent, share
from parley.units import counted


def _encodable(value: Any) -> Any:
    """Text without the lone surrogates that broken JSON escapes leave behind: UTF-8 cannot encode them."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


TOTALS = {"kept": "rows", "dropped": "rows", "supervised_tokens": "tokens"}  # figures shown as a share of another
DATA_NAMES = {
    "reason": "recognised as", "kept": "kept to train on", "heldout": "held out", "heldout_source": "held-out source",
    "heldout_dropped": "held-out rows dropped", "heldout_repeated": "held-out rows seen in training",
    "bad": "bad rows", "unread": "columns not used", "length_mean": "tokens a row, mean",
    "length_median": "tokens a row, median", "length_p95": "tokens a row, 95% up to",
    "length_max": "tokens a row, longest",
}  # fmt: skip
"""Fields of DataSummary to what the page calls them; the others keep their names."""
Text = Annotated[str, BeforeValidator(_encodable)]


class Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Scores(Figures):
    """Held-out scores: rates from 0 to 1, loss in nats per supervised token."""

    style_rate: float | None = None
    accuracy: float | None = None
    heldout_loss: float | None = None
    heldout_tokens: int | None = None
    preference_accuracy: float | None = None
    reward: float | None = None


class Turn(BaseModel):
    """One message; keys beside role and content, such as tool_calls, are kept and shown as JSON."""

    model_config = ConfigDict(extra="allow")
    role: Text
    content: Text | None = None


class StepAnswer(Figures):
    """An answer during training, after `step`."""

    step: int
    text: Text


class Answer(Figures):
    """A question, the model's answers before, during and after training, and the data set's own where it has one."""

    question: list[Turn] | Text
    before: Text | None = None
    during: list[StepAnswer] = Field(default_factory=list)
    after: Text | None = None
    reference: Text | None = None


class StepFigures(Figures):
    """One optimizer step that was logged or evaluated. Memory in GiB, seconds since training began."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    memory_gib: float | None = None
    token_accuracy: float | None = None
    seconds: float | None = None
    heldout_loss: float | None = None
    reward: float | None = None
    reward_std: float | None = None
    heldout_reward: float | None = None
    kl: float | None = None
    completion_tokens: float | None = None
    margin: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    preference_accuracy: float | None = None
    heldout_preference_accuracy: float | None = None


class SampledAnswer(Figures):
    """An answer that was sampled during training at `step`, its weighted reward, and its advantage over its group."""

    step: int
    prompt: Text
    completion: Text
    reward: float | None = None
    advantage: float | None = None


class StepFault(Figures):
    """A step that needs a look: its loss or gradient is not finite, or its loss is far above the `typical` one."""

    step: int
    kind: Literal["nonfinite", "spike"]
    loss: float | None = None
    typical: float | None = None
    rows: list[Text] = Field(default_factory=list)


class Resources(Figures):
    """Device, memory and time of a run. Memory in GiB: of the GPU, or on a CPU of the machine and the process."""

    device: Text = ""
    memory_total_gib: float | None = None
    memory_before_gib: float | None = None
    memory_peak_gib: float | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    stages: dict[str, float] = Field(default_factory=dict)
    tokens: int | None = None
    supervised_tokens: int | None = None
    tokens_per_s: float | None = None


class MaskExample(Figures):
    """A training row as runs of decoded text, each with whether its tokens are supervised."""

    origin: Text
    pieces: list[tuple[Text, bool]]


class ExportSummary(Figures):
    """An export of the run: what was measured, as name and value, and answers that differ from the trained model's."""

    name: Text
    status: Text
    failure: Text | None = None
    rows: list[tuple[Text, Text]] = Field(default_factory=list)
    differences: list[tuple[Text, Text, Text]] = Field(default_factory=list)  # question, trained, exported


class Report(Figures):
    title: Text
    created: str = ""
    model: Text = ""
    data: Text = ""
    before: Scores | None = None
    after: Scores | None = None
    answers: list[Answer] = Field(default_factory=list)
    steps: list[StepFigures] = Field(default_factory=list)
    samples: list[SampledAnswer] = Field(default_factory=list)
    step_faults: list[StepFault] = Field(default_factory=list)
    kept_step: int | None = None  # whose weights were saved, where they are not those of the last step
    resources: Resources = Field(default_factory=Resources)
    data_summary: dict[str, Any] = Field(default_factory=dict)
    data_lines: list[Text] = Field(default_factory=list)
    diagnosis: Diagnosis | None = None
    examples: list[MaskExample] = Field(default_factory=list)
    settings_yaml: Text = ""
    versions: dict[str, Text] = Field(default_factory=dict)
    exports: list[ExportSummary] = Field(default_factory=list)
    next_commands: list[Text] = Field(default_factory=list)
    notes: list[Text] = Field(default_factory=list)


def write_report(folder: Path, report: Report) -> Path:
    """Write report.json and report.html into `folder`, each atomically; returns the path of the page.

    Raises RunError when the folder cannot be written to.
    """
    page = render_html(report)  # before anything is replaced: a template that fails leaves the old pair
    write_figures(folder, report)
    return replace_file(folder / "report.html", page, f"parley report {folder}")


def write_figures(folder: Path, report: Report) -> Path:
    """Write report.json alone. Raises RunError."""
    return replace_file(folder / "report.json", report.model_dump_json(indent=1), f"parley report {folder}")


def render_html(report: Report) -> str:
    """The page as one string; the same report gives the same page."""
    return _template().render(
        report=report,
        lead=lead(report),
        scores=score_changes(report),
        charts=charts(report),
        resources=resource_rows(report.resources),
        data_rows=data_rows(report.data_summary),
        faults=fault_rows(report.step_faults),
        data_facts=[Row(*fact) for fact in report.diagnosis.facts()] if report.diagnosis else [],
        versions=[Row(*item) for item in report.versions.items()],
    )


# -- sections of the page ------------------------------------------------------------------------------------------


class ScoreChange(NamedTuple):
    name: str
    before: str
    after: str
    bar: tuple[float, float] | None  # before and after in percent of a scale that starts at 0
    note: str


def lead(report: Report) -> list[str]:
    """The line under the title: steps, tokens, time, device and peak memory, as far as each is known."""
    used = report.resources
    known = [
        counted(report.steps[-1].step, "step") if report.steps else "",
        counted(used.tokens, "token") if used.tokens else "",
        duration(used.train_seconds) if used.train_seconds is not None else "",
        used.device,
        f"{gib(used.memory_peak_gib)} at the peak" if used.memory_peak_gib is not None else "",
    ]
    return [part for part in known if part]


def score_changes(report: Report) -> list[ScoreChange]:
    """The headline's scores: those measured before or after training."""
    before, after = report.before or Scores(), report.after or Scores()
    changes = []
    for name, field, note in (
        ("Style", "style_rate", "answers in the new style"),
        ("Accuracy", "accuracy", "held-out answers that are right"),
        ("Preference accuracy", "preference_accuracy", "held-out pairs whose chosen answer has the higher reward"),
        ("Reward", "reward", "held-out mean of sampled answers"),
        ("Held-out loss", "heldout_loss", _heldout_note(report)),
    ):
        old, new = getattr(before, field), getattr(after, field)
        if old is None and new is None:
            continue
        rate = field not in ("heldout_loss", "reward")
        values = [value for value in (old, new) if value is not None and isfinite(value)]
        top = 1.0 if rate else 1.1 * max(values, default=0.0)  # a loss has no upper end: the larger one, and a margin
        bar = (100 * old / top, 100 * new / top) if len(values) == 2 and top > 0 else None
        show: Callable[[float], str] = percent if rate else "{:.3g}".format
        changes.append(ScoreChange(name, _shown(old, show), _shown(new, show), bar, note))
    return changes


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return show(value) if isfinite(value) else "not finite"


class FaultRow(NamedTuple):
    step: str
    what: str
    loss: str
    rows: list[str]


def fault_rows(faults: list[StepFault]) -> list[FaultRow]:
    """Steps that need a look, in their order, each with what it is and the rows of its batch."""
    return [
        FaultRow(f"{fault.step:,}", _fault(fault), _shown(fault.loss, "{:.4g}".format), fault.rows) for fault in faults
    ]


def _fault(fault: StepFault) -> str:
    if fault.kind == "spike":
        return f"loss spike: {fault.typical:.4g} was typical" if fault.typical is not None else "loss spike"
    part = "gradient" if fault.loss is not None and isfinite(fault.loss) else "loss"
    return f"{part} not finite, update not applied"


class AnswerRun(NamedTuple):
    """Evaluations in a row with one answer; `steps`: the first, or the first and the last."""

    steps: str
    text: str


def answer_runs(answer: Answer) -> list[AnswerRun]:
    """The answers during training, of which equal ones in a row are one."""
    runs = []
    for text, group in groupby(sorted(answer.during, key=lambda each: each.step), key=lambda each: each.text):
        steps = [each.step for each in group]
        runs.append(AnswerRun(f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}", text))
    return runs


def charts(report: Report) -> list[Chart]:
    """The loss with the held-out loss, then the smaller charts; only those with something measured."""
    steps = report.steps
    heldout = [(row.step, row.heldout_loss) for row in steps]
    measured = {step for step, value in heldout if value is not None}
    # The evaluations before and after training are dots at both ends, unless the trainer evaluated at that step.
    ends = ((report.before, 0), (report.after, report.kept_step or (steps[-1].step if steps else 1)))
    heldout += [(step, scores.heldout_loss) for scores, step in ends if scores and step not in measured]
    smaller = (
        ("Divergence", "KL to the reference, nats", "kl", True),
        ("Answer length", "tokens", "completion_tokens", True),
        ("Learning rate", "", "learning_rate", False),
        ("Gradient norm", "", "grad_norm", True),
        ("Speed", "tokens/s", "tokens_per_s", True),
        ("Token accuracy", "of supervised tokens", "token_accuracy", True),
    )
    loss = [(row.step, row.loss) for row in steps]
    spikes = [(fault.step, fault.loss) for fault in report.step_faults if fault.kind == "spike"]
    unit = _loss_unit(report)
    found = [*reward_charts(report), line_chart("Loss", unit, loss, dots=heldout, spikes=spikes, smooth=True)]
    for title, unit, field, smooth in smaller:
        values = [(row.step, getattr(row, field)) for row in steps]
        found.append(line_chart(title, unit, values, from_zero=True, smooth=smooth))
    return [chart for chart in found if chart]


def reward_charts(report: Report) -> list[Chart | None]:
    """What a preference method or GRPO is about: rewards, margins and accuracies, with the held-out ones as dots."""
    steps = report.steps
    last = report.kept_step or (steps[-1].step if steps else 1)
    found = []
    for title, unit, field, score in (
        ("Reward", "mean of a step's answers", "reward", "reward"),
        ("Preference accuracy", "of a step's pairs", "preference_accuracy", "preference_accuracy"),
        ("Reward margin", "chosen minus rejected", "margin", ""),
        ("Reward of chosen answers", "log-ratio to the reference", "chosen_reward", ""),
        ("Reward of rejected answers", "log-ratio to the reference", "rejected_reward", ""),
    ):
        dots = [(row.step, getattr(row, f"heldout_{score}")) for row in steps] if score else []
        measured = {step for step, value in dots if value is not None}
        for scores, step in ((report.before, 0), (report.after, last)) if score else ():
            if scores is not None and step not in measured:
                dots.append((step, getattr(scores, score)))
        values = [(row.step, getattr(row, field)) for row in steps]
        found.append(line_chart(title, unit, values, dots=dots, smooth=True))
    return found


def data_rows(summary: dict[str, Any]) -> list[Row]:
    """What was counted of the data set, without the counts that are zero."""
    counted = {DATA_NAMES.get(name, name): value for name, value in summary.items()}
    totals = {DATA_NAMES.get(name, name): DATA_NAMES.get(total, total) for name, total in TOTALS.items()}
    return [row for row in flat_rows(counted, totals) if row.value not in ("0", "False")]


def resource_rows(used: Resources) -> list[Row]:
    """Device, memory, time and tokens, with their shares; only what was measured."""
    total, before, peak = used.memory_total_gib, used.memory_before_gib, used.memory_peak_gib
    grown = peak - before if peak is not None and before is not None else None
    rows = [
        _row("Memory of the device", total, gib),
        _row("Memory before training", before, gib, total, "memory"),
        _row("Peak memory", peak, gib, total, "memory"),
        _row("Peak memory for training", grown, gib, total, "memory"),
        _row("Training time", used.train_seconds, duration, used.total_seconds, "whole run"),
        _row("Whole run", used.total_seconds, duration),
        Row("Stages", ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in used.stages.items()))
        if used.stages
        else None,
        _row("Tokens", used.tokens, figure),
        _row("Supervised tokens", used.supervised_tokens, figure, used.tokens, "tokens"),
        _row("Speed", used.tokens_per_s, "{:,.0f} tokens/s".format),
    ]
    device = [Row("Device", used.device)] if used.device else []
    return device + [row for row in rows if row]


def _row(
    name: str, amount: float | None, show: Callable[[float], str], total: float | None = None, of: str = ""
) -> Row | None:
    return None if amount is None else Row(name, show(amount), share(amount, total), of)


PREFERENCE_LOSS = "of the method's objective"


def _loss_unit(report: Report) -> str:
    """A preference loss is a mean over pairs or answers, not over tokens."""
    rewarded = any(row.reward is not None or row.margin is not None for row in report.steps)
    return PREFERENCE_LOSS if rewarded else "nats per supervised token"


def _heldout_note(report: Report) -> str:
    unit = _loss_unit(report)
    tokens = (report.after or Scores()).heldout_tokens or (report.before or Scores()).heldout_tokens
    return f"{unit}, over {tokens:,} tokens" if tokens and unit != PREFERENCE_LOSS else unit


def _extras(turn: Turn) -> str:
    extra = {key: value for key, value in (turn.model_extra or {}).items() if value is not None}
    return json.dumps(extra, ensure_ascii=False) if extra else ""


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,  # names, rows and answers come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters["extras"] = _extras
    environment.filters["runs"] = answer_runs
    source = files("parley").joinpath("assets/report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def replace_file(path: Path, text: str, again: str) -> Path:
    """Write a sibling, then rename it: a full disk leaves no half file, and a link at `path` is not followed.

    Raises RunError, which names the command that writes the file `again`.
    """
    sibling = ""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            sibling = file.name
            file.write(text)
        os.chmod(sibling, 0o644)  # NamedTemporaryFile makes it 0600
        os.replace(sibling, path)
    except OSError as error:
        if sibling:
            Path(sibling).unlink(missing_ok=True)
        reason = error.strerror or error
        raise RunError(f"{path}: cannot be written ({reason}); change that, then run `{again}`") from None
    return path
