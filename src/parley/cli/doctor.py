"""`parley doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from parley.cli.terminal import out, quiet_libraries
from parley.text import visible

STYLES = {"good": "green", "note": "yellow", "bad": "bold red"}


def doctor(
    model: Annotated[str | None, typer.Option(help="Say which training path this model takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what this machine can do, and say what to change.

    Exit code 1 if something is bad.
    """
    quiet_libraries()
    from parley.models.doctor import diagnose

    findings = diagnose()
    if model is not None:
        from parley.training.path_finding import path_finding

        findings.append(path_finding(model))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("what", box=None, pad_edge=False, header_style="dim")
        for name in ("found", "advice"):
            table.add_column(name, overflow="fold")
        for finding in findings:
            table.add_row(
                finding.name, Text(visible(finding.value), STYLES[finding.state]), visible(finding.advice or "")
            )
        out.print(table)
    # An exit code, so that scripts can check a machine before they start a run.
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)
