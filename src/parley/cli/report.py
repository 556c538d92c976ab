"""`parley report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parley.cli.terminal import importing, out, quiet_libraries
from parley.text import print_text


def report(run: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")]) -> None:
    """Write a run's report.html again, from what the folder has kept.

    Example: parley report runs/demo
    """
    with importing():
        quiet_libraries()
        from parley.evaluation.rebuild_report import rebuild_report

    print_text(out, f"written: {rebuild_report(run, console=out)}", "dim", wrap=False)
