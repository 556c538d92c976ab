"""`parley inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from parley.cli.terminal import err, importing, out, quiet_libraries
from parley.errors import DataError, RunError, UsageError
from parley.text import print_text

if TYPE_CHECKING:
    from parley.config import RunConfig
    from parley.data.doctor.row_reader import RowKind
    from parley.data.inspection import InspectedRow


def inspect(
    data: Annotated[str, typer.Argument(help="Hub id, file (.jsonl .json .csv .tsv .txt .parquet) or folder.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder: count tokens, and show a row as its chat template writes it.")
    ] = None,
    row: Annotated[
        int | None, typer.Option(min=1, help="Show this row alone, and check no others; the first is 1.")
    ] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Second source: find the rows that it shares with the data.")
    ] = None,
    train_on: Annotated[
        Literal["all", "last"] | None, typer.Option(help="Assistant turns that are supervised; all by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System turn for conversations without one.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A run's setting, such as data.split=test. Repeatable."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the token ids of the row as well.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the coloured row to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON, and no row.")] = False,
) -> None:
    """Check a data set, or show a row as the model sees it.

    Prints what the data holds and what is wrong with it, worst first, each with its cure. With --model, lengths are in
    tokens too, and a row is shown with its supervised tokens in colour.

    Example: parley inspect rows.jsonl --model meta-llama/Llama-3.2-1B-Instruct --row 3
    """
    _check_options(model, row, ids, html, as_json)
    named = {
        "data.source": data,
        "data.heldout": heldout,
        "model.name": model,
        "data.train_on": train_on,
        "data.system": system,
    }
    run = _run_config(named, settings or [])
    with importing():
        quiet_libraries()
        from parley.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model) if model else None
    if tokenizer is not None and not as_json:
        _show_row(run, tokenizer, row, ids, html)
    if row is None:
        _check_rows(run, tokenizer, as_json)


def _check_options(model: str | None, row: int | None, ids: bool, html: Path | None, as_json: bool) -> None:
    """Raises UsageError for options that would have no effect."""
    of_a_row = {"--row": row is not None, "--ids": ids, "--html": html is not None}
    given = next((option for option, is_given in of_a_row.items() if is_given), None)
    if given and model is None:
        raise UsageError(f"{given} is of a row as a model's chat template writes it; name the model with --model")
    if given and as_json:
        raise UsageError(f"--json prints the checks of all rows and shows no row; leave {given} out")


def _show_row(run: RunConfig, tokenizer: Any, row: int | None, ids: bool, html: Path | None) -> None:
    """The row in colour; where no row was named, the first, whose faults are then among the checks."""
    from parley.data.inspection import inspect_row

    try:
        inspected = inspect_row(run.data, tokenizer, run.model.max_seq_length, row or 1, _kind(run))
    except DataError:
        if row is not None or html is not None:
            raise
        return
    _print_row(inspected, tokenizer, ids, html)


def _print_row(inspected: InspectedRow, tokenizer: Any, ids: bool, html: Path | None) -> None:
    from parley.data.preview import pieces, to_html, to_terminal

    print_text(out, inspected.format, "dim", wrap=False)
    shown = {name: pieces(tokenizer, rendered) for name, rendered in inspected.rendered.items()}
    for name, rendered in inspected.rendered.items():
        out.print(to_terminal(shown[name]))
        counts = f"{len(rendered.input_ids)} tokens, {sum(rendered.mask)} supervised (in colour)"
        print_text(out, f"{inspected.origin}{name and f', {name}'}: {counts}", "dim", wrap=False)
        if ids:
            styles = ("green" if supervised else "dim" for supervised in rendered.mask)
            out.print(
                Text.assemble(*((f"{token} ", style) for token, style in zip(rendered.input_ids, styles, strict=True)))
            )
    for line in inspected.lines:
        print_text(out, f"{inspected.origin}: {line}", wrap=False)
    if html:
        _write(html, to_html([piece for run in shown.values() for piece in run]))
        print_text(out, f"written: {html}", "dim", wrap=False)


def _kind(run: RunConfig) -> RowKind | None:
    """What the training method learns from; None where none was named: the columns show it."""
    if "method" not in run.training.model_fields_set:
        return None
    if run.training.method == "grpo":
        raise UsageError("inspect looks at answers, which grpo samples itself; parley train --dry-run shows prompts")
    return {"sft": "supervised", "kto": "labelled"}.get(run.training.method, "pairs")  # type: ignore[return-value]


def _check_rows(run: RunConfig, tokenizer: Any, as_json: bool) -> None:
    with importing():
        from parley.data.doctor.diagnose import diagnose
        from parley.data.doctor.table import to_terminal

    with err.status("checking rows"):
        diagnosis = diagnose(run.data, tokenizer, run.model.max_seq_length, kind=_kind(run))
    if as_json:
        # ASCII, since excerpts may hold what a terminal obeys.
        print(json.dumps(diagnosis.model_dump(mode="json"), indent=1))
        return
    out.print()
    out.print(to_terminal(diagnosis))


def _run_config(named: dict[str, str | None], settings: list[str]) -> RunConfig:
    """The named options, then --set: later ones win."""
    from parley.config import RunConfig

    # As JSON, so that a text such as "true" or "1.10" is not read as another YAML type.
    overrides = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    return RunConfig.create({}, [*overrides, *settings])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another file with --html") from None
