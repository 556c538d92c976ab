"""`parley demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from parley.cli.terminal import importing, out, quiet_libraries
from parley.cli.train import until_stopped


def demo(
    output: Annotated[Path | None, typer.Option(help="Folder for the run; runs/demo, or the next one free.")] = None,
    method: Annotated[
        Literal["sft", "dpo", "grpo"],
        typer.Option(
            help="sft: imitate a pirate's answers; dpo: prefer them to plain ones; grpo: end answers with one word, "
            "for a reward."
        ),
    ] = "sft",
) -> None:
    """Train the embedded model to talk like a pirate."""
    with importing():
        quiet_libraries()
        from parley import pipeline

    folder = output or _next_free(Path("runs/demo"))
    until_stopped(lambda: pipeline.demo(folder, console=out, method=method), folder)


def _next_free(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` ... that does not exist."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
