from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def settings(tmp_path: Path, tiny_llama_folder: Path, rows: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{name: {tiny_llama_folder}, max_seq_length: 128}}\n"
        f"data: {{source: {rows}, heldout_rows: 2}}\n"
    )
    return path


def test_a_plan_is_a_table(parley: Callable[..., Any], settings: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    ended = parley("plan", settings, "--gpu-memory", "8GiB", "--set", "training.max_steps=5")
    assert ended.code == 0, ended.err
    assert set(tmp_path.rglob("*")) == before
    for said in (
        " k parameters, ",
        "5 steps",
        "base weights",
        "CUDA context",
        "in all",
        "time: about",
        "disk: ",
        "fits: ",
    ):
        assert said in ended.out


def test_what_does_not_fit_ends_with_1_and_with_what_would(parley: Callable[..., Any], settings: Path) -> None:
    ended = parley("plan", settings, "--gpu-memory", "100MiB", "--json")
    assert ended.code == 1
    found = json.loads(ended.out)
    assert not found["fits"]
    assert found["peak_bytes"] > 100 * 2**20
    assert {alternative["settings"] for alternative in found["alternatives"]} >= {"--set training.memory=low"}
    shown = parley("plan", settings, "--gpu-memory", "100MiB")
    assert shown.code == 1
    assert "does not fit: " in shown.out
    assert "nothing of this fits" in shown.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--gpu-memory", "much"], 2, "such as 24GiB"),
        (["--set", "training.optim=adamm"], 2, "adamm"),
        (["--set", "model.name=./absent"], 1, "absent"),
        (["--set", "data.source=absent.jsonl"], 1, "absent.jsonl"),
        (["--set", "lora.target_modules=[nothing]"], 1, "nothing"),
    ],
)
def test_refusals_are_one_line(
    parley: Callable[..., Any], settings: Path, arguments: list[str], code: int, said: str
) -> None:
    ended = parley("plan", settings, *arguments)
    assert ended.code == code
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_nothing_to_plan(parley: Callable[..., Any]) -> None:
    assert parley("plan").code == 2


def test_a_plan_for_several_gpus_says_what_their_link_costs(parley: Callable[..., Any], settings: Path) -> None:
    ended = parley("plan", settings, "--gpu-memory", "8GiB", "--gpus", "2", "--set", "training.max_steps=5")
    assert ended.code == 0, ended.err
    assert "2 GPUs: about " in ended.out
    assert "that each sends over PCIe" in " ".join(ended.out.split())
    assert "memory sharded" in ended.out or "sharded" in ended.out
