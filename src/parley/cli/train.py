"""`parley train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli.terminal import Stopped, importing, out, quiet_libraries
from parley.errors import UsageError

if TYPE_CHECKING:
    from parley.config import RunConfig


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the run's settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: training.max_steps=100. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model to start from.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, file (.json .jsonl .csv .parquet) or folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the run; must be new.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the data, the mask and the number of steps; write nothing.")
    ] = False,
) -> None:
    """Fine-tune a model: give a YAML file, or just --model and --data.

    Example: parley train --model meta-llama/Llama-3.2-1B-Instruct --data rows.jsonl --output runs/mine
    """
    run = run_config(config, settings or [], model, data, output)
    with importing():
        quiet_libraries()
        from parley import pipeline

    if dry_run:
        pipeline.dry_run(run, console=out)
        return
    try:
        result = pipeline.train(run, console=out)
    except KeyboardInterrupt:
        raise Stopped(_what_is_kept(run.output)) from None
    if result.interrupted:
        raise Stopped(f"the weights of the last step are in {run.output}")


def run_config(
    config: Path | None, settings: list[str], model: str | None, data: str | None, output: Path | None
) -> RunConfig:
    """The YAML file, then the named options, then --set: later ones win."""
    from parley.config import RunConfig, read_yaml

    if config is None and model is None and data is None:
        raise UsageError("nothing to train: give a YAML file, or --model and --data (for a first look: parley demo)")
    # Through JSON, since an override is parsed as YAML: a name such as 1e5 stays a string.
    named = {"model.name": model, "data.source": data, "output": output and str(output)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    values = read_yaml(config) if config else {}
    if not values and model is None and data is None:
        raise UsageError(f"{config}: is empty, so there is nothing to train; write the run's settings in it")
    return RunConfig.create(values, [*overrides, *settings])


def _what_is_kept(output: Path) -> str:
    """`pipeline.train` handles Ctrl-C during training itself: here the run was stopped before or after that."""
    from parley.training.run_folder import RunFolder

    weights = RunFolder(output).weights
    return f"the trained weights are whole in {weights}" if weights.is_dir() else "nothing was written"
