"""`parley train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated

import typer

from parley.cli import launch
from parley.cli.terminal import Stopped, importing, out, quiet_libraries
from parley.errors import UsageError

if TYPE_CHECKING:
    from parley.config import RunConfig
    from parley.pipeline import RunResult


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with the run's settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting: training.max_steps=100. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model to start from.")] = None,
    data: Annotated[str | None, typer.Option(help="Hub id, file (.json .jsonl .csv .parquet) or folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the run; must be new.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="sft; a preference method: dpo, ipo, kto, orpo or simpo; or grpo, with --reward.", show_default=False
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="grpo: a reward function, file.py:function or module:function, to be run. Repeatable."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Continue the run in this folder from its last checkpoint, with its settings."
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Train on so many GPUs of this machine, a process on each."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Train in so many processes on the CPU.")
    ] = None,
    scale_batch: Annotated[
        bool,
        typer.Option(
            "--scale-batch", help="Several processes: the batch settings are those of each, not of the whole step."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the data, the mask and the number of steps; write nothing.")
    ] = False,
) -> None:
    """Fine-tune a model from a YAML file or options, or --resume a run.

    Example: parley train --model meta-llama/Llama-3.2-1B-Instruct --data rows.jsonl --output runs/mine
    """
    if resume is not None:
        given: dict[str, object] = {"a YAML file": config, "--model": model, "--data": data, "--output": output}
        given |= {"--method": method, "--dry-run": dry_run, "--scale-batch": scale_batch}
        if extra := [name for name, value in given.items() if value]:
            raise UsageError(f"--resume continues a run with its own settings: leave {extra[0]} out; --set changes one")
        run = _resumed_config(resume, [*_rewards(reward), *(settings or [])])
    else:
        run = run_config(config, [*_rewards(reward), *(settings or [])], model, data, output, method)
    if dry_run and (gpus or processes):
        raise UsageError("--dry-run looks at data and settings alone: leave --gpus and --processes out")
    if gpus is not None or processes is not None:
        count = launch.gpu_processes(gpus, run) if gpus is not None else launch.cpu_processes(processes or 1, run)
        if count > 1 and run.training.method != "sft":
            raise UsageError(
                f"--method {run.training.method} trains in one process, and here are {count}: leave --gpus and "
                "--processes out"
            )
        if count > 1:
            options = _options([*_rewards(reward), *(settings or [])], model, data, output, resume, method, scale_batch)
            launch.launch(count, ["train", *([str(config)] if config else []), *options])
            return
    with importing():
        quiet_libraries()
        from parley import pipeline
        from parley.training.processes import from_main, joined_processes, process_count
        from parley.training.run_folder import RunFolder

    if dry_run:
        pipeline.dry_run(run, console=out)
        return

    def start() -> RunResult:
        with joined_processes():
            if scale_batch:
                run.training.gradient_accumulation_steps *= process_count()
            if resume is None and launch.is_restart() and from_main(RunFolder.is_run(run.output)):
                return pipeline.train(console=out, resume=run.output)
            return pipeline.train(run, console=out, resume=resume)

    until_stopped(start, run.output)


def _options(
    settings: list[str] | None,
    model: str | None,
    data: str | None,
    output: Path | None,
    resume: Path | None,
    method: str | None,
    scale_batch: bool,
) -> list[str]:
    """The command line of these options, for the processes that are launched."""
    named = {"--model": model, "--data": data, "--output": output, "--resume": resume, "--method": method}
    options = [f"{name}={value}" for name, value in named.items() if value is not None]
    return [*options, *(f"--set={setting}" for setting in settings or []), *(["--scale-batch"] * scale_batch)]


def _rewards(rewards: list[str] | None) -> list[str]:
    """`--reward` as a `--set`."""
    return [f"training.rewards={json.dumps(rewards)}"] if rewards else []


def until_stopped(start: Callable[[], RunResult], output: Path) -> None:
    """Train with `start`. Raises Stopped, with what is kept and how to continue, where a signal ended it."""
    try:
        result = start()
    except KeyboardInterrupt as stop:
        from parley.training.signals import StopRequested

        signal = stop.signal if isinstance(stop, StopRequested) else SIGINT
        raise Stopped(_what_is_kept(output), signal) from None
    if result.signal is not None:
        step = result.report.steps[-1].step if result.report.steps else 0
        raise Stopped(f"step {step} is saved; to continue: {result.folder.resume_command}", result.signal)


def _resumed_config(run: Path, settings: list[str]) -> RunConfig:
    """The settings of a run, with those of --set changed."""
    with importing():
        quiet_libraries()  # before RunFolder, whose libraries warn while they are imported
        from parley.config import RunConfig
        from parley.training.run_folder import RunFolder

    folder = RunFolder.existing(run)
    return RunConfig.create(folder.config.model_dump(mode="json"), settings) if settings else folder.config


def run_config(
    config: Path | None,
    settings: list[str],
    model: str | None,
    data: str | None,
    output: Path | None,
    method: str | None = None,
) -> RunConfig:
    """The YAML file, then the named options, then --set: later ones win."""
    from parley.config import RunConfig, read_yaml

    if config is None and model is None and data is None:
        raise UsageError("nothing to train: give a YAML file, or --model and --data (for a first look: parley demo)")
    # Through JSON, since an override is parsed as YAML: a name such as 1e5 stays a string.
    named = {"model.name": model, "data.source": data, "output": output and str(output)}
    named["training.method"] = method
    overrides = [f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    values = read_yaml(config) if config else {}
    if not values and model is None and data is None:
        raise UsageError(f"{config}: is empty, so there is nothing to train; write the run's settings in it")
    return RunConfig.create(values, [*overrides, *settings])


def _what_is_kept(output: Path) -> str:
    """What a run has on the disk that was stopped at once: before its first step, at a second signal, or at its end."""
    from parley.training.checkpoint import newest_whole
    from parley.training.run_folder import RunFolder

    folder = RunFolder(output)
    if not RunFolder.is_run(output):
        return "nothing was written"
    try:
        checkpoint, _ = newest_whole(folder.checkpoints)
    except KeyboardInterrupt:  # once more, while checksums are computed
        return f"to continue: {folder.resume_command}"
    kept = f"{checkpoint.name} is whole" if checkpoint else "no checkpoint was written yet"
    return f"{kept}; to continue: {folder.resume_command}"
