"""The demo as a newcomer sees it: the embedded model learns the manner, keeps the facts, and is exported whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import parley
from parley.exporting.gguf.quantization import SCHEMES
from parley.exporting.registry import EXPORTERS
from parley.pipeline import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's run, and what it printed."""
    output, said = tmp_path_factory.mktemp("demo") / "demo", io.StringIO()
    demo(output, Console(file=said, width=100))
    return output, said.getvalue()


def test_the_embedded_model_learns_to_talk_like_a_pirate(trained: tuple[Path, str]) -> None:
    run, said = trained
    report = json.loads((run / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["style_rate"] <= 0.02
    assert before["accuracy"] >= 0.95
    assert after["style_rate"] >= 0.95
    assert after["accuracy"] >= 0.90
    assert after["heldout_loss"] < before["heldout_loss"] / 2
    assert "parley train --model" in said


def test_its_exports_answer_all_questions_as_it_does(trained: tuple[Path, str], tmp_path: Path) -> None:
    done = {
        each.record.name: each.record
        for each in parley.export(trained[0], ["merged", "gguf"], ["f32", "f16", "q8_0"], output=tmp_path / "out")
    }
    figures = {name: record.figures for name, record in done.items() if record.figures is not None}
    same = {name: (each.answers_equal, each.answers) for name, each in figures.items()}
    assert all(record.status == "verified" for record in done.values())
    assert same["merged-f32"] == same["gguf-f32"] == same["gguf-f16"] == (100, 100)
    assert same["gguf-q8_0"][0] >= 97
    worst = figures["merged-f32"].worst_logit
    assert worst is not None
    assert worst < 1e-4


def test_it_is_exported_and_verified_in_every_other_form(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.exporting.samples.MOST_ANSWERS", 4)  # of 100: this is about forms
    quants = [quant for quant in SCHEMES if quant not in ("f32", "f16", "q8_0")]
    once = [target for target in EXPORTERS if target not in ("gguf", "ollama")]
    done = parley.export(trained[0], [*once, "gguf"], quants, output=tmp_path / "out")
    done += parley.export(trained[0], "ollama", output=tmp_path / "ollama")
    assert [each.record.name for each in done] == [
        "adapter", "merged-bf16", "gguf-lora", "mlx", "vllm", *(f"gguf-{quant}" for quant in quants), "ollama-q8_0",
    ]  # fmt: skip
    for each in done:
        assert each.record.status == "verified", (each.record.name, each.record.figures)
        assert each.record.figures is not None
        assert each.record.figures.prompts_equal == each.record.figures.prompts == 164
