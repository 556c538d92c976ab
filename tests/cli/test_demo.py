from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parley import pipeline


@pytest.mark.parametrize(("interrupted", "code"), [(False, 0), (True, 130)])
def test_the_demo_goes_where_it_is_told_and_says_when_it_was_stopped(
    parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, interrupted: bool, code: int
) -> None:
    outputs = []

    def demo(output: Path, console: Any) -> Any:
        outputs.append(output)
        return SimpleNamespace(interrupted=interrupted)

    monkeypatch.setattr(pipeline, "demo", demo)
    ended = parley("demo", "--output", tmp_path / "demo")
    assert outputs == [tmp_path / "demo"]
    assert ended.code == code
    line = f"parley: stopped; the weights of the last step are in {tmp_path / 'demo'}\n"
    assert ended.err == (line if interrupted else "")


def test_a_second_demo_takes_the_next_folder(
    parley: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outputs = []

    def demo(output: Path, console: Any) -> Any:
        outputs.append(output)
        output.mkdir(parents=True)
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr(pipeline, "demo", demo)
    monkeypatch.chdir(tmp_path)
    assert [parley("demo").code for _ in range(3)] == [0, 0, 0]
    assert outputs == [Path("runs/demo"), Path("runs/demo-2"), Path("runs/demo-3")]
