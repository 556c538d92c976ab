"""A job on one trainer after the other, and the table of what came out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parley.bench.jobs import Job
from parley.bench.rows import write_rows
from parley.bench.trainers import PARLEY, check_who
from parley.config import RunConfig
from parley.errors import DeviceError, RunError, UsageError

COLUMNS = {
    "ms a step, median": "median_step_ms",
    "mean": "mean_step_ms",
    "first step, s after start": "first_step_after_start_s",
    "GiB allocated": "peak_allocated_gib",
    "GiB reserved": "peak_reserved_gib",
}


def compare(job: Job, config: RunConfig, who: Sequence[str], repeat: int = 1) -> Iterator[dict[str, Any]]:
    """The report of each trainer in `who` as it ends; `run` counts its repetitions, of which later ones find caches.

    Raises UsageError for a trainer that is unknown or not installed, DeviceError where the job needs a GPU, what
    `write_rows` raises, and RunError for a trainer that failed.
    """
    check(job, who)
    with tempfile.TemporaryDirectory(prefix="parley-bench-") as temporary:
        folder = Path(temporary)
        write_rows(job, config, folder / "data")
        settings = folder / "run.yaml"
        settings.write_text(config.to_yaml(), encoding="utf-8")
        commit = _commit()
        for name in who:
            for run in range(1, repeat + 1):
                report = _in_own_process(name, job, settings, folder / "data")
                yield {**report, "run": run, "commit": commit}


def check(job: Job, who: Sequence[str]) -> None:
    """What can be wrong before anything is loaded."""
    if not who:
        raise UsageError("nobody to time; name someone with --who or --against")
    for name in who:
        check_who(name)
    if "unsloth" in who and importlib.util.find_spec("unsloth") is None:
        raise UsageError("unsloth is not installed; pip install unsloth, or leave it out of --against")
    if "unsloth" in who and not job.needs_gpu:
        raise UsageError(f"unsloth needs a GPU, and job {job.name} is the CPU's; leave it out of --against")
    if job.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"job {job.name} needs a GPU and none is usable here; see `parley doctor`, or take demo")


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `reports`, and how Parley compares with each peer."""
    head = ["trainer", *COLUMNS, "first losses", "last losses"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for report in reports:
        name = report["who"] if report["run"] == 1 else f"{report['who']}, run {report['run']}"
        figures = ["" if report[key] is None else f"{report[key]:,}" for key in COLUMNS.values()]
        losses = [", ".join(f"{loss:.4f}" for loss in report[key]) for key in ("first_losses", "last_losses")]
        lines.append("| " + " | ".join([name, *figures, *losses]) + " |")
    firsts = {report["who"]: report for report in reversed(reports)}
    ours = firsts.get(PARLEY)
    for name, theirs in firsts.items():
        if ours is not None and not name.startswith(PARLEY):
            lines += ["", _against(ours, theirs)]
    return "\n".join(lines)


def _against(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    pairs = list(zip(ours["losses"], theirs["losses"], strict=False))
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    words = f"losses at most {apart:.2%} apart at any of {len(pairs)} steps."
    if ours["median_step_ms"] is None or theirs["median_step_ms"] is None:
        return f"Parley and {theirs['who']}: {words}"
    faster = theirs["median_step_ms"] / ours["median_step_ms"]
    return f"Parley takes {faster:.1f} times the steps per second of {theirs['who']} (medians); {words}"


def _in_own_process(who: str, job: Job, settings: Path, folder: Path) -> dict[str, Any]:
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "parley.bench.worker", who, job.name, str(settings), str(folder), str(result)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode or not result.is_file():
        said = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
        raise RunError(f"{who} failed on job {job.name}: {said[-1] if said else f'exit code {ran.returncode}'}")
    return json.loads(result.read_text(encoding="utf-8"))


def _commit() -> str | None:
    """The commit of the checkout that this code lies in; None where it was installed without one."""
    here = Path(__file__).parent
    try:
        ran = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() or None
