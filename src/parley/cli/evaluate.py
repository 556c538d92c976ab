"""`parley eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from parley.cli.loading import TrustRemoteCode
from parley.cli.terminal import importing, out, quiet_libraries
from parley.text import print_text


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    data: Annotated[str | None, typer.Option(help="Other rows to evaluate on: hub id, file or folder.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Evaluate on only the first rows.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare a run's base and tuned model on held-out rows.

    Also writes RUN/eval.json.

    Example: parley eval runs/demo
    """
    with importing():
        quiet_libraries()
        from parley.evaluation.evaluate_run import evaluate_run

    scores = {
        name: score.model_dump(exclude_none=True)
        for name, score in evaluate_run(
            run, data=data, rows=rows, console=out, trust_remote_code=trust_remote_code
        ).items()
    }
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for name in scores:
        table.add_column(name, justify="right")
    for figure in dict.fromkeys(figure for score in scores.values() for figure in score):
        cells = (f"{score[figure]:,.4g}" if figure in score else "" for score in scores.values())
        table.add_row(figure.replace("_", " "), *cells)
    out.print(table)
    print_text(out, f"written: {run / 'eval.json'}", "dim", wrap=False)
