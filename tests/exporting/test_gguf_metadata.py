"""What programs show of a GGUF file, and what is said of types that a matrix could not get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import parley
from parley.exporting.gguf.exporter import general_metadata
from parley.exporting.trained_model import open_run


def test_names_size_and_base_are_in_the_file(run: Path, tmp_path: Path) -> None:
    (done,) = parley.export(run, "gguf", "q4_k_m", output=tmp_path / "out", verify=False)
    reader = GGUFReader(next(done.folder.glob("*.gguf")))
    found: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    assert {name: found[f"general.{name}"] for name in ("architecture", "type", "name", "basename", "finetune")} == {
        "architecture": "llama", "type": "model", "name": "tuned", "basename": "llama", "finetune": "tuned",
    }  # fmt: skip
    assert found["general.size_label"] == "123K"
    assert (found["general.base_model.count"], found["general.base_model.0.name"]) == (1, "llama")
    assert (found["general.file_type"], found["general.quantization_version"]) == (15, 2)
    for name in ("context_length", "embedding_length", "block_count", "attention.head_count", "vocab_size"):
        assert found[f"llama.{name}"] > 0
    # The model's rows have 64 and 128 values, and a k-quant's block 256.
    assert [note for note in done.record.notes if "instead of" in note] == [
        "GGUF: 13 matrices are q5_0 instead of q4_k, as their rows are no multiple of its block of values; llama.cpp's "
        "own quantizer does the same",
        "GGUF: 3 matrices are q8_0 instead of q6_k, as their rows are no multiple of its block of values; llama.cpp's "
        "own quantizer does the same",
    ]


def test_a_base_on_the_hub_is_named_with_its_address(run: Path) -> None:
    trained = open_run(run)
    trained.weights.shapes()
    trained.base = trained.base.model_copy(update={"name": "owner/base"})
    found = general_metadata(trained)
    assert found["base_model.0.organization"] == "owner"
    assert found["base_model.0.repo_url"] == "https://huggingface.co/owner/base"


@pytest.mark.parametrize("name", ["räuber 海賊 (2) [x]", 'it\'s a "run" %d {f}'])
def test_any_name_of_a_run(name: str, build_run: Callable[..., Path], tmp_path: Path) -> None:
    moved = build_run("llama").rename(tmp_path / name)
    done = parley.export(moved, ["merged", "gguf", "gguf-lora", "ollama", "vllm", "mlx"], "f32")
    assert [each.record.status for each in done] == ["verified"] * len(done)
    assert {each.folder.parent for each in done} == {moved / "exports"}
