"""Generator of the embedded model's data: small conversations with checkable answers, and a pirate version of them.

Everything is sampled from a seed. `base_conversations` trained the embedded model; `write_assets` writes what ships
with Parley: `pirate_rows`, which the demo fine-tunes on, and `heldout_questions`, which score it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo_data.conversations import base_conversations, pirate_rows, plain_conversations, preference_rows
from demo_data.heldout import heldout_questions

__all__ = [
    "base_conversations",
    "heldout_questions",
    "pirate_rows",
    "plain_conversations",
    "preference_rows",
    "write_assets",
]

TRAINING_ROWS = 2000
HELDOUT_QUESTIONS = 100
PREFERENCE_ROWS = 600


def write_assets(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "train.jsonl", pirate_rows(TRAINING_ROWS))
    _write_lines(folder / "preferences.jsonl", preference_rows(PREFERENCE_ROWS))
    _write_lines(folder / "heldout.jsonl", (question.to_json() for question in heldout_questions(HELDOUT_QUESTIONS)))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
