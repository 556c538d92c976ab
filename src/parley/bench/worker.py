"""Runs one trainer on one job: python -m parley.bench.worker TRAINER JOB SETTINGS.yaml FOLDER RESULT.json

Under torchrun, in each of its processes; the first one writes the result.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from parley.bench.jobs import JOBS, Job
from parley.config import RunConfig
from parley.units import GIB

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "parley-llm")


def main(name: str, job_name: str, settings: str, folder: str, result: str) -> None:
    if name == "unsloth":
        importlib.import_module(name)  # it must be imported before the libraries that it patches
    try:
        with _processes(name):
            report = run(name, JOBS[job_name], RunConfig.from_yaml(settings), Path(folder))
    except Exception as error:
        # The launcher prints a page of its own after this error.
        if (failed := Path(folder) / "failed").parent.is_dir() and not failed.exists():
            failed.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        Path(result).write_text(json.dumps(report), encoding="utf-8")


@contextmanager
def _processes(name: str) -> Iterator[None]:
    """Parley's processes are joined as `parley train` does it; those of a peer as the peer does it."""
    import torch

    if name.startswith("parley"):
        from parley.training.processes import joined_processes

        with joined_processes():
            yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(name: str, job: Job, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train and return the report, with the keys of benchmarks/results/. None: not measured."""
    from transformers import TrainerCallback

    from parley.bench.collectives import ProfiledSteps
    from parley.bench.trainers import PARLEY, build

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.logs: list[dict[str, float]] = []
            self.graphs: list[int] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            # No synchronisation: with a log line at every step the trainer itself waits for the device.
            self.times.append(time.time())
            self.graphs.append(captured_graphs(trainer))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.logs.append(logs)

    trainer, clock = build(name, job, config, folder), StepClock()
    trainer.add_callback(clock)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    profiled = ProfiledSteps(config.training.max_steps) if processes > 1 else None
    if profiled is not None:
        trainer.add_callback(profiled)
    started = time.time()
    trainer.train()
    wall = time.time() - started
    graphs = clock.graphs or [0]
    is_parley = name.startswith(PARLEY)
    plan = trainer.fused_step.plan if is_parley and trainer.fused_step else None
    # Compared between trainers: a fast step with other losses would be another job.
    losses = [round(float(logs["loss"]), 5) for logs in clock.logs]
    tokens = step_tokens(clock.logs)
    timed = clock.times if profiled is None else clock.times[: profiled.first]
    figures = step_times(timed, job.skip)
    return {
        "trainer": name,
        "job": job.name,
        "processes": processes,
        **figures,
        "tokens_per_s": tokens_per_s(timed, tokens, job.skip),
        **({} if profiled is None else profiled.figures(figures["mean_step_ms"])),
        # Before the first step, and numbers of the steps that captured one (more) of their own.
        "graphs": {"before": graphs[0], "at_steps": [i + 2 for i, (a, b) in enumerate(pairwise(graphs)) if b > a]},
        "step_tokens": tokens,
        "step_ms": [round(1000 * (b - a), 2) for a, b in pairwise(clock.times)],
        "first_step_s": round(clock.times[0] - started, 1),
        # From the start of the process: imports, loading and compilation are part of what a user waits for.
        "first_step_after_start_s": round(clock.times[0] - psutil.Process(os.getpid()).create_time(), 1),
        "train_wall_s": round(wall, 1),
        "steps": len(clock.times),
        **peak_memory(),
        "predicted_gib": None if plan is None else round(plan.predicted_bytes / GIB, 2),
        "first_losses": losses[:3],
        "last_losses": losses[-2:],
        "losses": losses,
        "tokens": int(clock.logs[-1]["num_tokens"]) if clock.logs and "num_tokens" in clock.logs[-1] else None,
        "grad_norms": [round(float(logs["grad_norm"]), 5) for logs in clock.logs if "grad_norm" in logs],
        "path": path_of(trainer) if is_parley else None,
        "plain_because": trainer.plain_because if is_parley else None,
        "machine": machine(),
        "versions": {package: found for package in PACKAGES if (found := installed_version(package)) is not None},
    }


def step_times(times: list[float], skip: int) -> dict[str, float | None]:
    """Median and mean time between the ends of steps, in ms, without the first `skip` steps."""
    steps = sorted(b - a for a, b in pairwise(times[skip:]))
    if not steps:
        return {"median_step_ms": None, "mean_step_ms": None}
    return {
        "median_step_ms": round(1000 * steps[len(steps) // 2], 2),
        "mean_step_ms": round(1000 * sum(steps) / len(steps), 2),
    }


def path_of(trainer: Any) -> str:
    """The path that Parley's trainer took."""
    if trainer.fused_step is not None:
        return "fused"
    return "plain" if trainer.captured_step is None else "captured"


def tokens_per_s(times: list[float], tokens: list[int], skip: int) -> int | None:
    """Of all processes, over the steps after the first `skip`; None where a trainer counts none."""
    if len(times) <= skip + 1 or len(tokens) < len(times):
        return None
    return round(sum(tokens[skip + 1 : len(times)]) / (times[-1] - times[skip]))


def captured_graphs(trainer: Any) -> int:
    """CUDA graphs that Parley's fused or captured step holds; 0 for other trainers."""
    from parley.training.trainer import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        return 0
    if trainer.captured_step is not None:
        return len(trainer.captured_step.graphs)
    fused = trainer.fused_step
    return 0 if fused is None or fused.graphs is None else len(fused.graphs.captured)


def step_tokens(logs: list[dict[str, float]]) -> list[int]:
    """Tokens of each logged step, from TRL's running count; empty where a trainer logs none."""
    counts = [0.0, *(log["num_tokens"] for log in logs if "num_tokens" in log)]
    return [int(b - a) for a, b in pairwise(counts)]


def peak_memory() -> dict[str, float | None]:
    import torch

    if not torch.cuda.is_available():
        return {"peak_allocated_gib": None, "peak_reserved_gib": None}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def machine() -> str:
    import torch

    from parley.training.resource_usage import device_name

    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
