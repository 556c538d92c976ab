"""What a run's folder says about it, read without torch and without trust: the rows of `parley runs`.

Folders may be broken, half-written or not from Parley. Nothing in one raises: what cannot be read is left out, and a
folder without settings is `broken`, with the reason.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from parley.errors import RunError
from parley.safe_yaml import read_yaml_file
from parley.training.run_lock import is_locked, is_locked_elsewhere
from parley.training.run_outcome import OUTCOMES

State = Literal["running", "finished", "stopped", "failed", "broken"]
MOST_BYTES = 256 * 2**20  # of a file that is read, as in rebuild_report
DEPTH = 3  # folders below the one that is listed
MOST_FOLDERS = 10_000
# A run on another machine cannot be asked for. One that has written nothing for so long has ended.
SILENT_SECONDS = 15 * 60


@dataclass
class RunSummary:
    """`loss` and `heldout_loss` are the last ones; `size` is the folder's in bytes, `date` in seconds since 1970."""

    path: str
    state: State
    model: str | None = None
    data: str | None = None
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    heldout_loss: float | None = None
    date: float = 0.0
    size: int = 0
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    report: dict[str, Any] = field(default_factory=dict, repr=False)


def list_runs(folder: Path, read: Callable[[Path], RunSummary] | None = None) -> list[RunSummary]:
    """The runs in `folder`, newest first; `folder` may be a run itself. Raises RunError where there is no folder.

    read: in place of `read_run`, for a caller that keeps summaries.
    """
    try:
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; give the one that runs are written to")
        found = [(read or read_run)(path) for path in _run_folders(folder)]
    except PermissionError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(found, key=lambda run: (-run.date, run.path))


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders with a run.yaml, not looking into those that have one. Links are not followed."""
    waiting = [(folder, 0)]
    for _ in range(MOST_FOLDERS):
        if not waiting:
            return
        path, depth = waiting.pop()
        if (path / "run.yaml").is_file():
            yield path
            continue
        if depth == DEPTH:
            continue
        try:
            entries = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            if path == folder:
                raise
            continue
        waiting += [(entry, depth + 1) for entry in entries]


def read_run(path: Path) -> RunSummary:
    """The summary of the run in `path`. Raises RunError where there is no run.yaml."""
    if not (path / "run.yaml").is_file():
        raise RunError(f"{path}: no run there (no run.yaml); give the folder `parley train` wrote")
    run = RunSummary(str(path), "failed", date=_modified(path / "run.yaml"), size=_size(path))
    try:
        settings = read_yaml_file(path / "run.yaml", RunError)
    except RunError as error:
        return _broken(run, str(error))
    if not isinstance(settings, dict):
        return _broken(run, "run.yaml holds no settings")
    run.settings = settings
    run.model, run.data = _name(settings.get("model"), "name"), _name(settings.get("data"), "source")
    run.report = _read_report(path / "report.json")
    _read_events(run, path)
    _read_results(run)
    return run


def _broken(run: RunSummary, reason: str) -> RunSummary:
    run.state, run.reason = "broken", reason
    return run


def _name(section: Any, key: str) -> str | None:
    value = section.get(key) if isinstance(section, dict) else section
    return value if isinstance(value, str) else None


def _read_events(run: RunSummary, path: Path) -> None:
    """State, steps and losses by the event log. Step events but the last are not parsed: there may be a million."""
    started: dict[str, Any] = {}
    last_step: bytes | None = None
    outcome: str | None = None
    for line in _lines(path / "events.jsonl"):
        if b'"event": "step"' in line:
            last_step = line
            continue
        event = _json(line)
        if not isinstance(event, dict):
            continue
        kind = event.get("event")
        if kind == "start":
            started, outcome = event, None
            run.max_steps = _count(event.get("max_steps"))
        elif kind == "eval":
            run.heldout_loss = _figure(event.get("eval_loss"))
        elif kind in OUTCOMES:
            outcome = kind
    step = _json(last_step) if last_step is not None else None
    if isinstance(step, dict):
        run.step, run.loss = _count(step.get("step")), _figure(step.get("loss"))
    run.date = max(run.date, _modified(path / "events.jsonl"))
    run.state = _state(run, path, started, outcome)


def _state(run: RunSummary, path: Path, started: dict[str, Any], outcome: str | None) -> State:
    # The lock is held from before the model is loaded until all is written, also by a run that is resumed.
    if is_locked(path):
        return "running"
    if outcome is not None:
        return outcome  # type: ignore[return-value]
    if is_locked_elsewhere(path) and time.time() - run.date < SILENT_SECONDS:
        return "running"
    # Runs of versions that wrote no outcome: a page is written when all is done.
    if not started.get("host") and (path / "report.html").is_file() and _has_weights(path):
        notes = run.report.get("notes")
        stopped = isinstance(notes, list) and any(str(note).startswith("stopped by hand") for note in notes)
        return "stopped" if stopped else "finished"
    return "failed"


def _has_weights(path: Path) -> bool:
    return any((path / name).is_dir() for name in ("adapter", "model"))


def _read_report(path: Path) -> dict[str, Any]:
    value = _json(b"".join(_lines(path)))
    return value if isinstance(value, dict) else {}


def _read_results(run: RunSummary) -> None:
    """The held-out loss of the trained model, where the report has one."""
    after = run.report.get("after")
    loss = _figure(after.get("heldout_loss")) if isinstance(after, dict) else None
    run.heldout_loss = run.heldout_loss if loss is None else loss


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a regular file of a credible size; none of anything else (a device or pipe would never end)."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return
        with path.open("rb") as file:
            yield from file
    except OSError:
        return


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _figure(value: Any) -> float | None:
    """A number, also one that report.json holds as text ("NaN", "Infinity")."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) or isinstance(value, str | float) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    """Bytes of all files below `path`; links count as themselves."""
    total = 0
    for folder, _, files in os.walk(path, onerror=None):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total
