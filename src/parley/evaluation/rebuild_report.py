"""`rebuild_report`: write the page of a run again, from what its folder has kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from parley.errors import RunError
from parley.evaluation.report_events import add_events, steps_of_events
from parley.evaluation.run_report import report_of_settings
from parley.text import print_text
from parley.training.report import Report, Scores, write_report
from parley.training.run_folder import RunFolder

MAX_BYTES = 256 * 2**20  # of a run of a million steps; beyond it, a file is not what training wrote


def rebuild_report(run: Path, console: Console | None = None) -> Path:
    """Write report.json and report.html of `run` again; returns the page's path.

    Everything of report.json is kept; steps and held-out losses that it lacks come from events.jsonl, settings from
    run.yaml. What is missing or broken is printed. Works on runs that did not finish, too.

    Raises RunError where there is no run, or nothing of it to report.
    """
    console = console or Console()
    folder = RunFolder.existing(run)
    config = folder.config
    report = _read_report(folder.path / "report.json", console) or report_of_settings(config)
    events = _read_events(folder.events, console)
    steps = steps_of_events(events)
    # A run that died wrote report.json before its first step, and every step to events.jsonl.
    if len(steps) > len(report.steps):
        report.steps = steps
    _add_heldout_losses(report, events)
    add_events(report, events)
    answered = any(answer.before or answer.during or answer.after for answer in report.answers)
    if not report.steps and not answered and report.before is None:
        raise RunError(f"{run}: neither report.json nor events.jsonl has anything to report; train again")
    return write_report(folder.path, report)


def _read_report(path: Path, console: Console) -> Report | None:
    text = _read(path, console)
    if text is None:
        return None
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        print_text(console, f"{path}: not what training writes, left out ({error.error_count()} errors)")
        return None


def _read_events(path: Path, console: Console) -> list[dict[str, Any]]:
    events, broken = [], 0
    for line in (_read(path, console) or "").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None  # the last line of a run that was killed may be half a line
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
        else:
            broken += 1
    if broken:
        print_text(console, f"{path}: {broken} lines are not events, left out")
    return events


def _read(path: Path, console: Console) -> str | None:
    try:
        # is_file() is False for devices and pipes, which a stranger's folder may link to and which never end.
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            print_text(console, f"{path}: missing, or not what training writes; left out")
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        print_text(console, f"{path}: cannot be read, left out")
        return None


def _add_heldout_losses(report: Report, events: list[dict[str, Any]]) -> None:
    """The losses before and after training, where the report ends before its evaluations."""
    losses = [event for event in events if event.get("event") == "eval" and isinstance(event.get("eval_loss"), float)]
    if report.before is None and losses and losses[0]["step"] == 0:
        report.before = Scores(heldout_loss=losses[0]["eval_loss"])
    if report.after is None and losses and losses[-1]["step"] > 0:
        report.after = Scores(heldout_loss=losses[-1]["eval_loss"])
