"""`parley card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parley.cli.loading import TrustRemoteCode
from parley.cli.terminal import importing, out, quiet_libraries
from parley.text import print_text


def card(
    source: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="Folder of a run, or of one of its exports.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write to, - for the terminal; by default README.md in the folder.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the model card of a run or an export.

    Base, data, settings, figures, comparison and limits.

    Example: parley card runs/demo --output -
    """
    with importing():
        quiet_libraries()
        from parley.exporting.card import CARD_FILE
        from parley.exporting.write_card import card_of, write_text

    text = card_of(source, trust_remote_code=trust_remote_code)
    if str(output) == "-":
        print(text, end="")
        return
    place = output or source.expanduser() / CARD_FILE
    write_text(place, text)
    print_text(out, f"wrote {place}", wrap=False)
