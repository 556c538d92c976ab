"""`parley inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from parley.cli.terminal import importing, out, quiet_libraries
from parley.errors import RunError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.config import RunConfig


def inspect(
    data: Annotated[str, typer.Argument(help="Hub id, file (.jsonl .json .csv .tsv .txt .parquet) or folder.")],
    model: Annotated[str, typer.Option(help="Hub id or folder whose chat template writes the row.")],
    row: Annotated[int, typer.Option(min=1, help="Which row; the first is 1.")] = 1,
    train_on: Annotated[
        Literal["all", "last"] | None, typer.Option(help="Assistant turns that are supervised; all by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System turn for conversations without one.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A run's setting, such as data.split=test. Repeatable."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids as well.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the coloured row to this file.")] = None,
) -> None:
    """Show a row as the model sees it, supervised tokens in colour.

    Example: parley inspect rows.jsonl --model meta-llama/Llama-3.2-1B-Instruct --row 3
    """
    run = _run_config(data, model, train_on, system, settings or [])
    with importing():
        quiet_libraries()
        from parley.data.inspection import inspect_row
        from parley.data.preview import pieces, to_html, to_terminal
        from parley.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    inspected = inspect_row(run.data, tokenizer, run.model.max_seq_length, row)
    rendered = inspected.rendered
    shown = pieces(tokenizer, rendered) if rendered is not None else []

    print_text(out, inspected.format, "dim", wrap=False)
    if rendered is not None:
        out.print(to_terminal(shown))
        counts = f"{len(rendered.input_ids)} tokens, {sum(rendered.mask)} supervised (in colour)"
        print_text(out, f"{inspected.origin}: {counts}", "dim", wrap=False)
    for line in inspected.lines:
        print_text(out, f"{inspected.origin}: {line}", wrap=False)
    if ids and rendered is not None:
        styles = ("green" if supervised else "dim" for supervised in rendered.mask)
        out.print(
            Text.assemble(*((f"{token} ", style) for token, style in zip(rendered.input_ids, styles, strict=True)))
        )
    if html:
        _write(html, to_html(shown))
        print_text(out, f"written: {html}", "dim", wrap=False)


def _run_config(data: str, model: str, train_on: str | None, system: str | None, settings: list[str]) -> RunConfig:
    """The named options, then --set: later ones win."""
    from parley.config import RunConfig

    named = {"data.source": data, "model.name": model, "data.train_on": train_on, "data.system": system}
    # As JSON, so that a text such as "true" or "1.10" is not read as another YAML type.
    overrides = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    return RunConfig.create({}, [*overrides, *settings])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another file with --html") from None
