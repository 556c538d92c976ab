"""`parley demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parley.cli.terminal import Stopped, out, quiet_libraries


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the run; made by the demo.")] = Path("runs/demo"),
) -> None:
    """Teach the embedded model to talk like a pirate."""
    quiet_libraries()
    from parley import road

    if road.demo(output, console=out).interrupted:
        raise Stopped(f"what was learned until then is in {output}")
