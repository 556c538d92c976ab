"""What the next run does otherwise than the last one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parley.config import RunConfig
from parley.training.run_diff import diff_runs
from parley.training.run_summary import RunSummary

PLACES = ("model.name", "data.source", "data.heldout")
UNTOLD = ("model.name_from_run",)  # written by the run


def settings_diff(config: RunConfig, last: RunSummary) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between `last` and a run of `config`, each with both values."""
    new = RunSummary("", "running", settings=config.model_dump(mode="json"))
    found = diff_runs(last, new)["settings"]
    return {
        name: (before, after)
        for name, (before, after) in found.items()
        if name not in UNTOLD and not (name in PLACES and _same_place(before, after))
    }


def last_run(runs: Sequence[RunSummary]) -> RunSummary | None:
    """The newest run whose settings can be read."""
    return next((run for run in runs if run.settings), None)


def _same_place(a: Any, b: Any) -> bool:
    # A run writes the places of its files out in full.
    return isinstance(a, str) and isinstance(b, str) and Path(a).absolute() == Path(b).absolute()
