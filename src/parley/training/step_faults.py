"""Steps of a run that need a look: those that are not finite, and loss spikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from parley.data.packing import Document
from parley.text import print_text
from parley.training.callbacks import EventLog
from parley.training.json_lines import append_line
from parley.training.step_monitor import StepRecord


class StepFaultLog:
    """A StepListener that writes events, and the rows of steps that are not finite to `path`, one a line."""

    def __init__(self, log: EventLog, path: Path, tokenizer: Any, console: Console) -> None:
        self.log, self.path, self.tokenizer, self.console = log, path, tokenizer, console

    def nonfinite(self, record: StepRecord) -> None:
        figures = {"step": record.step, "loss": record.loss, "grad_norm": record.grad_norm}
        for document in record.documents:
            append_line(self.path, figures | self._row(document))
        rows = f"; its rows are in {self.path}" if record.documents else ""
        message = f"step {record.step}: {record.fault}, so that its update is not applied{rows}"
        self.log.write({"event": "nonfinite", **figures, "rows": record.rows, "message": message})
        print_text(self.console, message)

    def spike(self, record: StepRecord) -> None:
        figures = {"step": record.step, "loss": record.loss, "typical": record.typical}
        self.log.write({"event": "spike", **figures, "rows": record.rows})

    def _row(self, document: Document) -> dict[str, Any]:
        ids = document.ids_L.tolist()
        return {"origin": document.origin, "tokens": len(ids), "text": self.tokenizer.decode(ids)}
