from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parley import pipeline
from parley.training.run_folder import RunFolder


@pytest.mark.parametrize(
    ("stopped_by", "code"), [(None, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_demo_goes_where_it_is_told_and_says_when_it_was_stopped(
    parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped_by: Any, code: int
) -> None:
    outputs = []

    def demo(output: Path, console: Any, method: str) -> Any:
        outputs.append(output)
        report = SimpleNamespace(steps=[SimpleNamespace(step=7)])
        return SimpleNamespace(signal=stopped_by, report=report, folder=RunFolder(output))

    monkeypatch.setattr(pipeline, "demo", demo)
    ended = parley("demo", "--output", tmp_path / "demo")
    assert outputs == [tmp_path / "demo"]
    assert ended.code == code
    line = f"parley: stopped; step 7 is saved; to continue: parley train --resume {tmp_path / 'demo'}\n"
    assert ended.err == (line if stopped_by else "")


def test_a_second_demo_takes_the_next_folder(
    parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outputs = []

    def demo(output: Path, console: Any, method: str) -> Any:
        outputs.append(output)
        output.mkdir(parents=True)
        return SimpleNamespace(signal=None)

    monkeypatch.setattr(pipeline, "demo", demo)
    monkeypatch.chdir(tmp_path)
    assert [parley("demo").code for _ in range(3)] == [0, 0, 0]
    assert outputs == [Path("runs/demo"), Path("runs/demo-2"), Path("runs/demo-3")]
