"""`parley plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from parley.cli.terminal import importing, out, quiet_libraries
from parley.cli.train import run_config
from parley.text import print_text, visible
from parley.units import counted, short_count

if TYPE_CHECKING:
    from parley.training.plan.memory import MemoryEstimate
    from parley.training.plan.run_plan import RunPlan

DOES_NOT_FIT = 1  # exit code, for scripts that ask before they start a run


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the run's settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: training.memory=low. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model to start from.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, file (.json .jsonl .csv .parquet) or folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; earlier runs beside it give the time.")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for a GPU of this memory, such as 24GiB, not for this machine."),
    ] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs that train together; sizes are those of one.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON; sizes in bytes.")] = False,
) -> None:
    """Say what a run takes of memory, time and disk.

    No weights are loaded.

    Exit code 1 if the run does not fit; what would fit is listed.

    Example: parley plan run.yaml --gpu-memory 24GiB
    """
    run = run_config(config, settings or [], model, data, output)
    with importing():
        quiet_libraries()
        from parley.training.plan.run_plan import plan as plan_run

    planned = plan_run(run, gpu_memory=gpu_memory, gpus=gpus)
    if as_json:
        print(json.dumps(planned.to_json(), indent=1))
    else:
        _print(planned)
    if not planned.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _print(planned: RunPlan) -> None:
    from parley.training.formatting import duration

    parameters, trained = short_count(planned.parameters), short_count(planned.trained_parameters)
    print_text(out, f"{planned.model}: {parameters} parameters, {trained} trained")
    longest = counted(planned.longest_row, "token")
    rows = "a stream" if planned.rows is None else f"{counted(planned.rows, 'row')} of up to {longest}"
    print_text(out, f"{rows}; {counted(planned.steps, 'step')}, {counted(planned.tokens, 'token')}")
    out.print(_memory_table(planned))
    for estimate in planned.estimates[:1]:
        for note in estimate.notes:
            print_text(out, note)
    if planned.not_fused_because and not planned.not_fused_because.startswith("engine: "):
        print_text(out, f"no fused step: {planned.not_fused_because}")
    for note in planned.notes:
        print_text(out, note, "yellow")
    print_text(out, f"time: about {duration(planned.seconds)} of training, {planned.time_basis}")
    if planned.link is not None:
        print_text(out, _several(planned))
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in planned.disk.items())
    print_text(out, f"disk: {sizes}")
    peak, free = _size(planned.peak_bytes), _size(planned.free_bytes)
    if planned.fits:
        print_text(out, f"fits: {peak} of {free} free on {planned.device}", "green")
        return
    print_text(out, f"does not fit: {peak} of {free} free on {planned.device}", "bold red")
    for alternative in planned.alternatives:
        verdict = "fits" if alternative.fits else "does not fit"
        style = "green" if alternative.fits else "dim"
        print_text(
            out, f"  {_size(alternative.peak_bytes):>10}  {verdict:<12}  {alternative.settings}", style, wrap=False
        )
    if not any(alternative.fits for alternative in planned.alternatives):
        print_text(out, "nothing of this fits: choose a smaller model, or a GPU with more memory", wrap=False)


def _several(planned: RunPlan) -> str:
    link = planned.link
    assert link is not None
    return (
        f"{planned.gpus} GPUs: about {planned.step_seconds:.2g} s a step, of it at most {link.seconds_a_step:.2g} "
        f"s for {_size(link.bytes_a_step)} that each sends over {link.link}"
    )


def _memory_table(planned: RunPlan) -> Table:
    """A column a path, the one that the run takes first; a row for each use of memory."""
    table = Table("peak memory", box=None, pad_edge=False, header_style="dim")
    for index, estimate in enumerate(planned.estimates):
        table.add_column(Text(visible(_title(estimate)), "bold" if index == 0 else ""), justify="right")
    for name in dict.fromkeys(name for estimate in planned.estimates for name in estimate.parts):
        cells = [_size(estimate.parts[name]) if name in estimate.parts else "" for estimate in planned.estimates]
        table.add_row(name, *cells)
    table.add_row("in all", *(Text(_size(estimate.peak_bytes), "bold") for estimate in planned.estimates))
    return table


def _title(estimate: MemoryEstimate) -> str:
    return estimate.path if not estimate.memory else f"{estimate.path}, memory {estimate.memory}"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.1f} MiB"
