"""What `parley train` prints when it is done."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from parley.training.report import Report, Resources, Scores
from parley.training.terminal_summary import print_summary


@pytest.mark.parametrize("compared", [True, False])
def test_scores_are_a_table_where_there_are_some(compared: bool) -> None:
    used = Resources(train_seconds=1, tokens_per_s=2, memory_before_gib=1, memory_peak_gib=2, memory_total_gib=4)
    scores = Scores(preference_accuracy=0.5) if compared else Scores()
    written = io.StringIO()
    report = Report(title="run", before=scores, after=scores, resources=used)
    print_summary(report, Path("adapter"), Path("report.html"), Console(file=written, width=80))
    assert ("after" in written.getvalue()) is compared
    assert ("preference accuracy" in written.getvalue()) is compared
    assert "trained 1" in written.getvalue()
