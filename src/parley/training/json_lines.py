"""JSON as standard parsers take it: without bare NaN and Infinity."""

from __future__ import annotations

import json
from math import isfinite, isnan
from pathlib import Path
from typing import Any

WEIGHTS = "weights"
"""The event of saved weights, adapter or model. Its step is the run's when they were saved."""


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append `value` to `path` as one line."""
    # Opened for each line: a run that is killed leaves whole lines, and no open file to close.
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(value) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in `path`; without the last one where a kill left half of its line."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def to_json(value: Any) -> str:
    """`value` as JSON in ASCII; a number that is not finite is the string that Python's float() reads."""
    return json.dumps(_with_strings(value), allow_nan=False)


def _with_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_strings(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_strings(inner) for inner in value]
    if not isinstance(value, float) or isfinite(value):
        return value
    return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
