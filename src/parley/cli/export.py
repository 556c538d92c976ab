"""`parley export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from parley.cli.loading import TrustRemoteCode
from parley.cli.terminal import complain, importing, out, quiet_libraries
from parley.text import print_text
from parley.units import GIB

if TYPE_CHECKING:
    from parley.exporting.export import Export


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    to: Annotated[
        list[str],
        typer.Option(
            "--to", metavar="TARGET", help="adapter, merged, gguf, gguf-lora, ollama, mlx or vllm. Repeatable."
        ),
    ],
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="gguf, ollama: f32 f16 bf16 q8_0 q6_k q5_k_m q5_0 q4_k_m q4_0; merged: f32 f16 bf16. Repeatable."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read it back with another program and compare.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder to write to; by default RUN/exports/TARGET.")] = None,
    base: Annotated[
        str | None, typer.Option(help="16-bit base to merge into, where the run was trained on a quantised one.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a run for other programs, and verify it.

    Merged model, GGUF file or adapter; for Ollama, MLX or vLLM.

    Each export is read back by transformers, PEFT or llama.cpp. One that differs ends with exit code 1 and has
    UNVERIFIED in its README.md.

    Example: parley export runs/demo --to merged --to gguf --quant q8_0
    """
    with importing():
        quiet_libraries()
        from parley.exporting.export import export as export_run

    exports = export_run(
        run, to, quant or [], verify=verify, output=output, base=base, console=out, trust_remote_code=trust_remote_code
    )
    for note in dict.fromkeys(note for each in exports for note in each.record.notes):
        print_text(out, note)
    out.print(_table(exports))
    for each in exports:
        print_text(out, f"written: {each.folder}", "dim", wrap=False)
        if each.command is not None:
            print_text(out, f"{each.record.name}: {each.command}", wrap=False)
    failed = [each for each in exports if not each.passed]
    for each in failed:
        assert each.record.figures is not None
        complain(f"{each.record.name} is {_UNVERIFIED}: {each.record.figures.failure}; the files are in {each.folder}")
    if failed:
        raise typer.Exit(1)


_UNVERIFIED = "UNVERIFIED"


def _table(exports: list[Export]) -> Table:
    from parley.exporting.table import figure_rows

    table = Table("", box=None, pad_edge=False, header_style="dim")
    for each in exports:
        table.add_column(each.record.name, justify="right")
    rows: dict[str, list[str]] = {}
    for index, each in enumerate(exports):
        record = each.record
        size = sum(record.files.values())
        figures = figure_rows(record.figures) if record.figures is not None else []
        status = record.status if record.status == "verified" else _UNVERIFIED
        shown = size / GIB
        facts = [("size", f"{shown:.2f} GiB" if shown >= 1 else f"{size / 2**20:.1f} MiB"), *figures]
        for name, value in [*facts, ("result", status)]:
            rows.setdefault(name, [""] * len(exports))[index] = value
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
