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


def test_a_plan_for_several_gpus_gives_time_memory_and_link(parley: Callable[..., Any], settings: Path) -> None:
    options = ("plan", settings, "--gpu-memory", "8GiB", "--set", "training.max_steps=5")
    alone, two = (json.loads(parley(*options, "--gpus", count, "--json").out) for count in ("1", "2"))
    assert (alone["gpus"], alone["link"], two["gpus"]) == (1, None, 2)
    assert (alone["steps"], alone["tokens"]) == (two["steps"], two["tokens"])  # the same steps, shared out
    names = [(estimate["path"], estimate["memory"]) for estimate in two["estimates"]]
    assert names == [("fused", "auto"), ("fused", "low"), ("plain", ""), ("captured", "sharded")]
    whole, sharded = two["estimates"][0]["parts"], two["estimates"][-1]["parts"]
    assert whole["base weights"] == alone["estimates"][0]["parts"]["base weights"]
    assert whole["activations"] < 0.7 * alone["estimates"][0]["parts"]["activations"]
    assert sharded["base weights"] == pytest.approx(whole["base weights"] / 2, rel=0.01)
    assert sharded["gathered weights"] > 0
    # The adapter's gradient in float32, once to the other GPU and back: a ring of two.
    link = two["link"]
    assert (link["link"], link["bytes_a_step"]) == ("PCIe", 4 * two["trained_parameters"])
    assert link["seconds_a_step"] == pytest.approx(link["bytes_a_step"] / (0.7 * 32e9))
    assert two["step_seconds"] == pytest.approx(two["seconds"] / two["steps"])
    # So small a step takes its launches, on one GPU as on two.
    assert two["step_seconds"] - link["seconds_a_step"] == pytest.approx(alone["step_seconds"])

    shown = " ".join(parley(*options, "--gpus", "2").out.split())
    step, sent = f"{two['step_seconds']:.2g} s", f"{link['seconds_a_step']:.2g} s"
    size = f"{link['bytes_a_step'] / 2**20:.1f} MiB"
    assert f"2 GPUs: about {step} a step, of it at most {sent} for {size} that each sends over PCIe" in shown
    assert "sharded" in shown.partition("base weights")[0]  # a column of the table
    assert f"{sharded['base weights'] / 2**20:.1f} MiB adapter weights" in shown
