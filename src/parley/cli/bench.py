"""`parley bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from parley.cli import launch
from parley.cli.terminal import err, quiet_libraries, renamed_option
from parley.errors import UsageError
from parley.text import visible


def bench(
    job: Annotated[str, typer.Argument(help="demo, seed, tuned, long, 8b, 8b-short or mix.")] = "demo",
    against: Annotated[str, typer.Option(help="Peers on the same rows: trl,unsloth.")] = "",
    trainers: Annotated[str, typer.Option(help="Of parley, parley-low, parley-plain, parley-5.5 (GiB).")] = "parley",
    model: Annotated[str | None, typer.Option(help="Folder or hub id instead of the job's model.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows instead of the job's data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps instead of the job's.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: lora.use_dora=true. Repeatable."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each trainer; later ones find warm caches.")] = 1,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Train on so many GPUs of this machine, each with the job's batch."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train in so many processes on the CPU.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also append the JSON lines to this file.")] = None,
    who: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time a training job on Parley and its peers, one after the other.

    Each runs in its own process. JSON lines on stdout, a Markdown table on stderr.

    Example: parley bench demo --against trl
    """
    trainers = renamed_option("--who", who, "--trainers", trainers)
    quiet_libraries()
    from parley.bench.compare import compare, table
    from parley.bench.jobs import find_job

    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder; make it, or choose another --output")
    if output is not None and output.is_dir():
        raise UsageError(f"{output}: is a folder; wanted a file, choose another --output")
    found = find_job(job)
    names = [name.strip() for name in f"{trainers},{against}".split(",") if name.strip()]
    config = found.config(model, data, steps, settings or ())
    count = 1
    if gpus is not None or processes is not None:
        count = launch.gpu_processes(gpus, config) if gpus is not None else launch.cpu_processes(processes or 1, config)
    reports = []
    with err.status(Text(visible(f"{job}: {', '.join(names)}"))):
        for report in compare(found, config, names, repeat, count):
            reports.append(report)
            line = json.dumps(report)
            # Flushed line by line: a later trainer may run out of memory or time.
            print(line, flush=True)
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    err.print(table(reports), soft_wrap=True, markup=False)
