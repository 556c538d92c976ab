"""README.md of an export: what it is, and whether it was proven to be the trained model."""

from __future__ import annotations

from pathlib import Path

from parley.exporting.record import ExportRecord
from parley.exporting.table import figure_rows

CARD_FILE = "README.md"
UNVERIFIED = "UNVERIFIED"
"""Stands in the card of an export that failed the comparison, and of one that was not compared."""


def write_card(folder: Path, record: ExportRecord) -> None:
    """Write README.md into an export's folder."""
    (folder / CARD_FILE).write_text(card_text(record), encoding="utf-8")


def card_text(record: ExportRecord) -> str:
    lines = ["---"]
    if record.base is not None and "/" in record.base:
        relation = {"adapter": "adapter", "gguf": "quantized"}.get(record.target, "finetune")
        lines += [f"base_model: {record.base}", f"base_model_relation: {relation}"]
    lines += ["tags: [parley]", "---", f"# {record.run}", "", *_status_lines(record), ""]
    lines += [f"Exported as {record.name} from the run `{record.run}` on {record.base or 'its own weights'}.", ""]
    lines += [f"- {note}" for note in record.notes]
    if record.figures is not None:
        lines += ["", "## Compared with the trained model", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in figure_rows(record.figures)]
    return "\n".join(lines) + "\n"


def _status_lines(record: ExportRecord) -> list[str]:
    if record.status == "verified":
        assert record.figures is not None
        return [f"Verified: read by {record.figures.program} and compared with the trained model."]
    if record.figures is not None:
        return [f"**{UNVERIFIED}**: it differs from the trained model: {record.figures.failure}."]
    return [f"**{UNVERIFIED}**: it was not compared with the trained model."]
