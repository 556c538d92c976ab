"""`parley push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from parley.cli.loading import TrustRemoteCode
from parley.cli.terminal import importing, out, quiet_libraries
from parley.text import print_text
from parley.units import file_size

if TYPE_CHECKING:
    from parley.exporting.push import Upload


def push(
    source: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="Folder of a run, or of one of its exports.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; without it, it is private.")
    ] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Send an export that failed the comparison, or was not compared.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Upload an export to the hub, into a private repository.

    Of a run, its adapter is exported and verified first (after full fine-tuning, the merged model). Weights, tokenizer,
    configuration, model card and export.json are sent; checkpoints, events, data and whatever else is in the folder are
    not. The files are shown before they are sent.

    Example: parley push runs/demo owner/pirate --dry-run
    """
    with importing():
        quiet_libraries()
        from parley.exporting.push import prepare_upload
        from parley.exporting.push import push as send

    upload = prepare_upload(source, repo, public=public, unverified=unverified, trust_remote_code=trust_remote_code)
    _show(upload)
    if dry_run:
        print_text(out, "nothing was sent (--dry-run)")
        return
    if not yes:
        typer.confirm(f"send these files to {repo}?", abort=True)
    with out.status("sending"):
        address = send(upload)
    print_text(out, f"sent to {address}", wrap=False)


def _show(upload: Upload) -> None:
    table = Table("file", box=None, pad_edge=False, header_style="dim")
    table.add_column("size", justify="right")
    for name in upload.files:
        table.add_row(name, file_size(upload.size(name)))
    out.print(table)
    visibility = "public" if upload.public else "private"
    print_text(
        out, f"{upload.record.name} of {upload.record.run}, {upload.record.status}, to {upload.repo} ({visibility})"
    )
    if upload.left_out:
        print_text(out, f"not sent: {', '.join(upload.left_out)}")
    for note in upload.notes:
        print_text(out, note)
