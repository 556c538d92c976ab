"""`parley studio`."""

from __future__ import annotations

import logging
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.terminal import err, out, require_extra
from parley.errors import UsageError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.studio.state import Studio

DEFAULT_FOLDER = Path("runs")
DEFAULT_PORT = 7717


def studio(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the runs; made where it is missing.")] = (
        DEFAULT_FOLDER
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --expose.")] = (
        "127.0.0.1"
    ),
    expose: Annotated[
        bool, typer.Option("--expose", help="Listen where other machines can reach it, without encryption.")
    ] = False,
    allow: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A folder that pages may open as well. Repeatable.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
) -> None:
    """Look at data, train, watch runs and compare answers in a browser.

    Runs that are started there are processes of their own: they continue when the studio ends.

    Example: parley studio runs
    """
    require_extra("studio", "fastapi", "uvicorn", "babel")
    from parley.serving.address import bind, is_loopback

    if not is_loopback(host) and not expose:
        raise UsageError(
            f"--host {host} can be reached from elsewhere; keep 127.0.0.1 and use a tunnel (ssh -L "
            f"{port}:127.0.0.1:{port} MACHINE), or give --expose as well"
        )
    for each in allow or []:
        if not each.expanduser().is_dir():
            raise UsageError(f"--allow {each}: no such folder")
    bound = bind(host, port)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    from parley.studio.server import serve
    from parley.studio.state import Studio

    here = Path.cwd()
    # The folder it is started in, unless that is nearly everything.
    allowed = [*(allow or []), *([here] if here not in (Path.home(), Path("/")) else [])]
    made = Studio(folder, port=bound.getsockname()[1], allowed=allowed)
    serve(made, bound, host, on_ready=lambda: _print_banner(made, bound, host, is_loopback(host), browser))


def _print_banner(studio: Studio, bound: socket.socket, host: str, loopback: bool, browser: bool) -> None:
    port = bound.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={studio.keys.token}"
    print_text(out, f"Parley studio of {studio.root}: {address}", wrap=False)
    print_text(out, "Whoever has this address can use it. Ctrl-C ends the studio, and no run.", wrap=False)
    print_text(out, f"Its pages may open files in {', '.join(map(str, studio.roots))} (--allow DIR)", wrap=False)
    if not loopback:
        print_text(
            err, f"warning: {host} can be reached from elsewhere, and nothing is encrypted", "yellow", wrap=False
        )
    if browser and not webbrowser.open(address):
        print_text(out, "No browser could be opened: open the address yourself.", wrap=False)
