"""What `parley train` prints when it is done: scores and answers before and after, resources, and what comes next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parley.text import print_text, visible
from parley.training.formatting import duration, gib, percent, share
from parley.training.report import Report, Resources, Scores

ANSWERS_SHOWN = 3
LONGEST_CELL = 200  # characters of an answer; the report has all of it


def print_summary(report: Report, weights: Path, page: Path, console: Console) -> None:
    """`weights`: the adapter's or model's folder; `page`: report.html."""
    comparison = _comparison(report)
    if comparison.row_count:  # no held-out rows and no questions: nothing was compared
        console.print(comparison)
    print_text(console, _resources_line(report.resources))
    print_text(console, f"weights: {weights}\nreport:  {page}", wrap=False)
    if report.next_commands:
        print_text(console, "\n  ".join(["next:", *report.next_commands]), wrap=False)


def _resources_line(used: Resources) -> str:
    assert used.train_seconds is not None
    assert used.tokens_per_s is not None
    assert used.memory_before_gib is not None
    assert used.memory_peak_gib is not None
    peak = share(used.memory_peak_gib, used.memory_total_gib) or 0.0
    return (
        f"trained {duration(used.train_seconds)} at {used.tokens_per_s:,.0f} tokens/s; memory "
        f"{gib(used.memory_before_gib)} before, {gib(used.memory_peak_gib)} at the peak ({peak:.1f}% of all)"
    )


def _comparison(report: Report) -> Table:
    """Scores and the first answers, before and after."""
    before, after = report.before or Scores(), report.after or Scores()
    table = Table("", "before", "after", title="before and after training", title_justify="left")
    rates = {
        "answers in style": (before.style_rate, after.style_rate),
        "preference accuracy": (before.preference_accuracy, after.preference_accuracy),
        "right answers": (before.accuracy, after.accuracy),
    }
    for name, (old, new) in rates.items():
        if old is not None and new is not None:
            table.add_row(name, percent(old), percent(new))
    if before.reward is not None and after.reward is not None:
        table.add_row("held-out reward", f"{before.reward:.3f}", f"{after.reward:.3f}")
    if before.heldout_loss is not None and after.heldout_loss is not None:
        table.add_row("held-out loss", f"{before.heldout_loss:.3f}", f"{after.heldout_loss:.3f}")
    for answer in report.answers[:ANSWERS_SHOWN]:
        question = answer.question if isinstance(answer.question, str) else answer.question[-1].content
        table.add_row(*map(_cell, (question, answer.before, answer.after)), style="dim")
    return table


def _cell(text: str | None) -> Text:
    text = visible(" ".join((text or "").split()))  # a table cell is one line, whatever the answer holds
    return Text(text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…")
