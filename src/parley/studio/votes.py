"""Blind votes: which of two answers is better, saved as preference pairs that `parley train --method dpo` reads."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

from parley.errors import RunError, UsageError

PREFERENCES = "preferences.jsonl"


def save_preference(path: Path, prompt: str, chosen: str, rejected: str, system: str | None = None) -> int:
    """Append one pair to the file `path`; returns how many it has then.

    Raises UsageError for answers that prefer nothing, RunError where the file cannot be written.
    """
    if not chosen.strip() or not rejected.strip():
        raise UsageError("one of the answers is empty, so that nothing can be learned from the vote")
    if chosen == rejected:
        raise UsageError("both answers are the same, so that none is better")
    turns = [{"role": "system", "content": system}] if system else []
    row = {
        "prompt": [*turns, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    try:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # two studios may share a folder
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None
    return count_preferences(path)


def count_preferences(path: Path) -> int:
    """Pairs in the file `path`; 0 where there is none."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
