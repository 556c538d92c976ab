"""The section of a run's report that shows its exports."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from parley.exporting.record import ExportRecord
from parley.exporting.table import figure_rows
from parley.training.report import ExportSummary, Report, write_report
from parley.training.run_folder import RunFolder

SHOWN_DIFFERENCES = 5


def add_to_report(folder: RunFolder, records: Sequence[ExportRecord]) -> str | None:
    """Add `records` to the report of the run, in place of earlier exports of the same name.

    Returns why that was not possible, where the run has no report that can be read. Raises RunError where it cannot be
    written.
    """
    path = folder.path / "report.json"
    try:
        report = Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return f"{path}: missing, or not what training writes; the exports are not added to the report"
    names = {record.name for record in records}
    report.exports = [each for each in report.exports if each.name not in names] + [_summary(each) for each in records]
    write_report(folder.path, report)
    return None


def _summary(record: ExportRecord) -> ExportSummary:
    figures = record.figures
    if figures is None:
        return ExportSummary(name=record.name, status=record.status)
    differences = [(each.question, each.trained, each.export) for each in figures.differences[:SHOWN_DIFFERENCES]]
    return ExportSummary(
        name=record.name,
        status=record.status,
        failure=figures.failure,
        rows=figure_rows(figures),
        differences=differences,
    )
