"""Methods that train in one process are refused before several are started."""

from __future__ import annotations

from pathlib import Path

import pytest

import parley
from parley.cli.train import train
from parley.config import RunConfig
from parley.errors import UsageError


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_several_processes_of_a_preference_method_are_refused_in_one_line(method: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        train(
            model="parley-demo", data="parley-demo-preferences", output=tmp_path / "run", method=method,
            reward=["parley.rewards:equals"] if method == "grpo" else None, processes=2,
        )  # fmt: skip
    assert str(error.value) == (
        f"--method {method} trains in one process, and here are 2: leave --gpus and --processes out"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_a_preference_method_under_a_launcher_is_refused_before_anything_is_loaded(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.training.preference.arguments.process_count", lambda: 2)
    config = RunConfig.create(
        {
            "model": str(tmp_path / "no-model"), "data": "parley-demo-preferences", "output": str(tmp_path / "run"),
            "training": {"method": method, "rewards": ["parley.rewards:equals"] if method == "grpo" else []},
        }
    )  # fmt: skip
    with pytest.raises(UsageError) as error:
        parley.train(config)
    assert str(error.value) == (
        f"training.method: {method} trains in one process, and here are 2: start it without --gpus, --processes and "
        "torchrun"
    )
