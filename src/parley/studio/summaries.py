"""Summaries of runs, kept while their files stay the same: reading one goes through its whole event log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from parley.training.run_lock import is_locked
from parley.training.run_summary import RunSummary, list_runs, read_run

FILES = ("run.yaml", "events.jsonl", "report.json", "run.lock")
MOST_KEPT = 1000
State: TypeAlias = "tuple[object, ...]"


class Summaries:
    """As `list_runs` and `read_run`. A running run changes all the time, and is read each time."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[State, RunSummary]] = {}

    def list(self, folder: Path) -> list[RunSummary]:
        return list_runs(folder, self.read)

    def read(self, path: Path) -> RunSummary:
        """Raises RunError where there is no run."""
        state = _state(path)
        kept = self._kept.get(path)
        if kept is not None and kept[0] == state:
            return kept[1]
        summary = read_run(path)
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        self._kept[path] = state, summary
        return summary


def _state(path: Path) -> State:
    found: list[object] = [is_locked(path)]
    for name in FILES:
        try:
            status = os.stat(path / name)
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)
