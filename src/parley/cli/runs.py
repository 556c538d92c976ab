"""`parley runs`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from parley.cli.terminal import out
from parley.errors import UsageError
from parley.text import print_text, visible

if TYPE_CHECKING:
    from parley.training.run_summary import RunSummary

STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "broken": "red"}
COLUMNS: tuple[str, ...] = ("run", "state", "step", "loss", "held-out", "date", "size", "model", "data")
WIDE = 100  # columns of a terminal that has space for the data's name as well
NUMBERS = frozenset({"step", "loss", "held-out", "size"})
MINIMUM = {"state": 8, "step": 9, "loss": 5, "held-out": 8, "date": 11, "size": 8}  # characters
LONGEST_VALUE = 60  # characters of a setting in the table; --json has all of it
DEFAULT_FOLDER = "runs"
DIFF = "diff"


def runs(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="DIR | diff A B", help="A folder of runs, or two runs to compare.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="With diff: also what is the same in both.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs with their state and losses, or compare two of them.

    Example: parley runs diff runs/first runs/second
    """
    given = arguments or [DEFAULT_FOLDER]
    if given[0] == DIFF:
        if len(given) != 3:
            raise UsageError(
                f"got {len(given) - 1} runs after diff, wanted two: parley runs diff runs/first runs/second"
            )
        _diff(Path(given[1]), Path(given[2]), everything=everything, as_json=as_json)
        return
    if len(given) > 1:
        raise UsageError(f"got {len(given)} folders, wanted one; to compare two runs: parley runs diff A B")
    if everything:
        raise UsageError("--all is for parley runs diff A B")
    _list(Path(given[0]), as_json=as_json)


def _list(folder: Path, *, as_json: bool) -> None:
    from parley.training.run_summary import list_runs

    found = list_runs(folder.expanduser())
    if as_json:
        print(json.dumps([_without_contents(run) for run in found], indent=1))
        return
    if not found:
        print_text(out, f"no runs in {folder}; `parley train` writes them there", wrap=False)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = COLUMNS if out.width >= WIDE else COLUMNS[:-1]
    while len(columns) > 2 and sum(MINIMUM.get(name, 4) + 2 for name in columns) - 2 > out.width:
        columns = columns[:-1]  # rich would leave out the first ones
    for name in columns:
        names = name in ("run", "model", "data")  # these are cut where the terminal is narrow, the others never
        table.add_column(
            name,
            justify="right" if name in NUMBERS else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=4 if names else MINIMUM[name],
        )
    for run in found:
        table.add_row(*_cells(run, folder)[: len(columns)])
    out.print(table)
    for run in found:
        if run.reason:
            print_text(out, f"{run.path}: {run.reason}", "dim")


def _cells(run: RunSummary, folder: Path) -> list[Text]:
    path = Path(run.path)
    name = str(path.relative_to(folder)) if path != folder and path.is_relative_to(folder) else run.path
    step = "" if run.step is None else f"{run.step:,}" + (f"/{run.max_steps:,}" if run.max_steps else "")
    date = _date(run.date)
    plain = [
        step,
        _figure(run.loss),
        _figure(run.heldout_loss),
        date,
        _size(run.size),
        _short(run.model),
        _short(run.data),
    ]
    return [Text(visible(name), "bold"), Text(run.state, STYLES[run.state]), *(Text(visible(cell)) for cell in plain)]


def _diff(a: Path, b: Path, *, everything: bool, as_json: bool) -> None:
    from parley.training.run_diff import diff_runs
    from parley.training.run_summary import read_run

    first, second = read_run(a.expanduser()), read_run(b.expanduser())
    sections = diff_runs(first, second, everything=everything)
    if as_json:
        print(json.dumps({"a": first.path, "b": second.path, **sections}, indent=1, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", overflow="fold")
    for run in (first, second):
        table.add_column(Text(visible(run.path)), overflow="fold")
    for title, values in sections.items():
        if values:
            table.add_row(Text(title, "bold"))
        for name, pair in values.items():
            differs = pair[0] != pair[1]
            cells = (Text(_value(value), "" if differs else "dim") for value in pair)
            table.add_row(Text(f"  {visible(name)}"), *cells)
    if any(sections.values()):
        out.print(table)
    else:
        print_text(out, "no difference in settings, data, results and versions")


def _value(value: Any) -> str:
    """A value in a table: text is shown without quotes, a missing one as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def _without_contents(run: RunSummary) -> dict[str, Any]:
    return {name: value for name, value in asdict(run).items() if name not in ("settings", "report")}


def _date(seconds: float) -> str:
    """Day and time; for an earlier year its date."""
    when = datetime.fromtimestamp(seconds)
    return when.strftime("%m-%d %H:%M" if when.year == datetime.now().year else "%Y-%m-%d")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _short(name: str | None) -> str:
    """The last two parts of a path or hub id."""
    return "/".join((name or "").rstrip("/").split("/")[-2:])


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
