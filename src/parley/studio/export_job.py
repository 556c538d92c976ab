"""One export in a process of its own: `python -m parley.studio.export_job RUN TARGET QUANT EVENTS`.

It writes what it does as lines of JSON into EVENTS, so that a page, also one that is opened later, shows it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from parley.errors import ParleyError, one_line


def main(run: str, target: str, quant: str, events: str) -> int:
    path = Path(events)

    def emit(**event: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    emit(event="process", pid=os.getpid(), started=psutil.Process().create_time())
    emit(event="stage", text="starting")
    try:
        return _export(run, target, quant, emit)
    except ParleyError as error:
        emit(event="failed", text=str(error))
    except Exception as error:
        emit(event="failed", text=f"{type(error).__name__}: {one_line(error)}")
        raise
    return 1


def _export(run: str, target: str, quant: str, emit: Any) -> int:
    from parley.exporting.export import export
    from parley.exporting.table import figure_rows
    from parley.quiet_libraries import quiet_libraries

    quiet_libraries()

    def on_progress(stage: str, figures: Any) -> None:
        emit(event="stage", text=stage, rows=[] if figures is None else figure_rows(figures))

    (done,) = export(run, target, quant or (), console=Console(quiet=True), on_progress=on_progress)
    emit(event="done", name=done.folder.name, passed=done.passed)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
