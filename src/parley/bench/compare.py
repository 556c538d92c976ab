"""Runs a job with one trainer after the other and formats the table of results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parley.bench.jobs import Job
from parley.bench.rows import write_rows
from parley.bench.trainers import PARLEY, check_trainer
from parley.config import RunConfig
from parley.errors import DeviceError, RunError, UsageError, one_line

COLUMNS = {
    "ms a step, median": "median_step_ms",
    "mean": "mean_step_ms",
    "tokens/s": "tokens_per_s",
    "first step, s after start": "first_step_after_start_s",
    "GiB allocated": "peak_allocated_gib",
    "GiB reserved": "peak_reserved_gib",
}
SHARES = {
    "all-reduce, share of a step": "all_reduce_share",
    "waiting for others": "waiting_share",
}  # of several processes


def compare(
    job: Job, config: RunConfig, trainers: Sequence[str], repeat: int = 1, processes: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields the report of each trainer as it ends; its key `run` counts repetitions, of which later ones find caches.

    `processes`: of each trainer, one a GPU; the job's batch settings are those of each process.

    Raises UsageError for a trainer that is unknown or not installed, DeviceError where the job needs a GPU, RunError
    for a trainer that failed, and the errors of `write_rows`.
    """
    check(job, trainers)
    with tempfile.TemporaryDirectory(prefix="parley-bench-") as temporary:
        folder = Path(temporary)
        write_rows(job, config, folder / "data", processes)
        settings = folder / "run.yaml"
        settings.write_text(config.to_yaml(), encoding="utf-8")
        commit = _commit()
        for name in trainers:
            for run in range(1, repeat + 1):
                report = _run_in_subprocess(name, job, settings, folder / "data", processes)
                yield {**report, "run": run, "commit": commit}


def check(job: Job, trainers: Sequence[str]) -> None:
    """Everything that can be refused before a model is loaded."""
    if not trainers:
        raise UsageError("no trainer to time; name one with --trainers or --against")
    for name in trainers:
        check_trainer(name)
    if "unsloth" in trainers and importlib.util.find_spec("unsloth") is None:
        raise UsageError("unsloth is not installed; pip install unsloth, or leave it out of --against")
    if "unsloth" in trainers and not job.needs_gpu:
        raise UsageError(f"unsloth needs a GPU, and job {job.name} is the CPU's; leave it out of --against")
    if job.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"job {job.name} needs a GPU and none is usable here; see `parley doctor`, or take demo")


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `reports`, and a line that compares Parley with each peer."""
    columns = COLUMNS | (SHARES if any(report["processes"] > 1 for report in reports) else {})
    head = ["trainer", *columns, "first losses", "last losses"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for report in reports:
        name = report["trainer"] if report["run"] == 1 else f"{report['trainer']}, run {report['run']}"
        figures = ["" if report[key] is None else f"{report[key]:,}" for key in columns.values()]
        losses = [", ".join(f"{loss:.4f}" for loss in report[key]) for key in ("first_losses", "last_losses")]
        lines.append("| " + " | ".join([name, *figures, *losses]) + " |")
    # Reversed, so that each trainer's first run is kept: later runs find its caches.
    first_runs = {report["trainer"]: report for report in reversed(reports)}
    ours = first_runs.get(PARLEY)
    for name, peer in first_runs.items():
        if ours is not None and not name.startswith(PARLEY):
            lines += ["", _comparison(ours, peer)]
    return "\n".join(lines)


def _comparison(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    pairs = list(zip(ours["losses"], peer["losses"], strict=False))
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    losses = f"losses differ by at most {difference:.2%} at any of {len(pairs)} steps."
    if ours["median_step_ms"] is None or peer["median_step_ms"] is None:
        return f"Parley and {peer['trainer']}: {losses}"
    speedup = peer["median_step_ms"] / ours["median_step_ms"]
    return f"Parley takes {speedup:.1f} times the steps per second of {peer['trainer']} (medians); {losses}"


def _run_in_subprocess(trainer: str, job: Job, settings: Path, folder: Path, processes: int = 1) -> dict[str, Any]:
    result = folder / "result.json"
    # Otherwise a trainer that writes no result would be reported with that of the previous one.
    result.unlink(missing_ok=True)
    worker = ["-m", "parley.bench.worker", trainer, job.name, str(settings), str(folder), str(result)]
    environment = dict(os.environ)
    if processes > 1:
        # The launcher that `torchrun` is, which TRL's users take; accelerate launch starts the same one.
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        worker = [*launcher, *worker]
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # A process each: memory peaks, CUDA caches and libraries patched by one trainer must not affect the next.
    process = subprocess.run(
        [sys.executable, *worker], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if process.returncode or not result.is_file():
        raise RunError(f"{trainer} failed on job {job.name}: {one_line(_reason(process, folder / 'failed'))}")
    return json.loads(result.read_text(encoding="utf-8"))


def _reason(process: subprocess.CompletedProcess[str], failed: Path) -> str:
    """What the first process that failed wrote down, before the launcher's own words; or the last line."""
    if failed.is_file():
        return failed.read_text(encoding="utf-8")
    lines = [line.strip() for line in process.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {process.returncode}"


def _commit() -> str | None:
    """The commit of the source checkout; None for an installed package."""
    here = Path(__file__).parent
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return process.stdout.strip() or None
