"""Steps of a run that need a look: those that are not finite, and loss spikes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from parley.data.packing import Document
from parley.text import print_text
from parley.training.callbacks import EventLog
from parley.training.json_lines import append_line
from parley.training.report import replace_file
from parley.training.step_monitor import StepRecord


class StepFaultLog:
    """A StepListener that writes events, and the rows of steps that are not finite to `path`, one a line."""

    def __init__(self, log: EventLog, path: Path, tokenizer: Any, console: Console) -> None:
        self.log, self.path, self.tokenizer, self.console = log, path, tokenizer, console

    def resume_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run takes again."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        replace_file(self.path, "".join(line + "\n" for line in kept), f"parley train --resume {self.path.parent}")

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
