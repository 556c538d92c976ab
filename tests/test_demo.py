"""The demo as a newcomer sees it: the embedded model learns the manner and keeps the facts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from parley.pipeline import demo


@pytest.mark.slow
def test_the_embedded_model_learns_to_talk_like_a_pirate(tmp_path: Path) -> None:
    said = io.StringIO()
    demo(tmp_path / "demo", Console(file=said, width=100))
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["style_rate"] <= 0.02
    assert before["accuracy"] >= 0.95
    assert after["style_rate"] >= 0.95
    assert after["accuracy"] >= 0.90
    assert after["heldout_loss"] < before["heldout_loss"] / 2
    assert "parley train --model" in said.getvalue()
