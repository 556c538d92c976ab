"""Votes become pairs that a preference run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.preferences import prepare_preferences
from parley.errors import RunError, UsageError
from parley.studio.votes import count_preferences, save_preference


def test_saved_pairs_are_read_as_preferences(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "preferences.jsonl"
    assert count_preferences(path) == 0
    assert save_preference(path, "Hi", "Ahoy\n<script>", "Hello") == 1
    assert save_preference(path, "一", "好", "不\ud800", system="Be a pirate.") == 2
    assert count_preferences(path) == 2
    prepared = prepare_preferences(DataSection(source=str(path), heldout_rows=0), tiny_tokenizer, 2048, "pairs")
    texts = [
        [tiny_tokenizer.decode(row[f"{side}_input_ids"]) for side in ("chosen", "rejected")] for row in prepared.train
    ]
    assert all(part in texts[0][0] for part in ("Hi", "Ahoy\n<script>"))
    assert "Hello" in texts[0][1]
    assert all("Be a pirate." in text for text in texts[1])
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [("a", "a", "both answers are the same"), (" ", "a", "is empty"), ("a", "", "is empty")],
)
def test_what_prefers_nothing_is_refused(tmp_path: Path, chosen: str, rejected: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_preference(tmp_path / "x.jsonl", "Hi", chosen, rejected)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        save_preference(tmp_path / "gone" / "x.jsonl", "Hi", "a", "b")
