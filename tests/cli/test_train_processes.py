"""Methods that train in one process are refused before several are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from parley.cli.train import train
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
