from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def own_run(run: Any, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(run.path, tmp_path / "tuned"))


def test_base_and_tuned_are_compared_and_written_down(parley: Callable[..., Any], own_run: Path) -> None:
    ended = parley("eval", own_run)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    scores = json.loads((own_run / "eval.json").read_text(encoding="utf-8"))
    assert scores["base"]["heldout_loss"] != scores["tuned"]["heldout_loss"]
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["base", "tuned"] in lines
    losses = [f"{scores[name]['heldout_loss']:,.4g}" for name in ("base", "tuned")]
    assert ["heldout", "loss", *losses] in lines


def test_other_rows_and_fewer(parley: Callable[..., Any], own_run: Path, rows: Path) -> None:
    ended = parley("eval", own_run, "--data", rows, "--rows", 3)
    assert ended.code == 0, ended.err
    fewer = json.loads((own_run / "eval.json").read_text(encoding="utf-8"))
    parley("eval", own_run, "--data", rows)
    whole = json.loads((own_run / "eval.json").read_text(encoding="utf-8"))
    assert fewer["tuned"]["heldout_tokens"] < whole["tuned"]["heldout_tokens"]


def test_a_folder_without_a_run_is_one_line(parley: Callable[..., Any], tmp_path: Path) -> None:
    ended = parley("eval", tmp_path)
    assert ended.code == 1
    assert ended.err.startswith(f"parley: error: {tmp_path}: no run there")
    assert ended.err.count("\n") == 1
