"""Answers end in every export where they end in training, whatever the base's generation config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

import parley
from parley.exporting.export import Export

SAMPLING = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}  # as Llama 2's: invalid together
ODD = ["<|begin_of_text|>", "<|start_header_id|>"]  # ends of answers that no program knows by their text


@pytest.fixture(scope="module")
def run(
    build_family: Callable[[str], Path], build_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A base model that ends texts at a token of its own, and knows nothing of the template's end of turn."""
    base = Path(shutil.copytree(build_family("llama"), tmp_path_factory.mktemp("ends") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.save_pretrained(base)
    ends: list[Any] = tokenizer.convert_tokens_to_ids([*ODD[1:], "<|end_of_text|>"])
    (base / "generation_config.json").write_text(json.dumps(SAMPLING | {"eos_token_id": ends}), encoding="utf-8")
    return build_run(base)


@pytest.fixture(scope="module")
def done(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    targets = ["adapter", "merged", "gguf", "ollama", "vllm"]
    exports = parley.export(run, targets, "f32", output=tmp_path_factory.mktemp("out") / "all")
    return {each.record.target: each for each in exports}


@pytest.mark.parametrize("target", ["adapter", "merged", "gguf", "ollama", "vllm"])
def test_every_end_token_ends_answers_there(done: dict[str, Export], target: str) -> None:
    assert done[target].record.status == "verified", done[target].record.figures


def test_the_generation_config_has_them_all(run: Path, done: dict[str, Export]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    wanted = tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|end_of_text|>", "<|eot_id|>"])
    for target in ("merged", "adapter", "vllm"):
        config = GenerationConfig.from_pretrained(done[target].folder)
        assert sorted(config.eos_token_id) == sorted(wanted)
    assert any("end of turn" in note for note in done["adapter"].record.notes)
    assert f"--generation-config {done['vllm'].folder}" in str(done["vllm"].command)


def test_the_modelfile_has_them_all(done: dict[str, Export]) -> None:
    lines = (done["ollama"].folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        f'PARAMETER stop "{text}"' for text in ("<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    ]
