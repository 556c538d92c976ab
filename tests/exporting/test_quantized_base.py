"""A run on a 4-bit or 8-bit checkpoint: merged into its dequantised weights, or into the 16-bit original."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import parley
from parley.errors import ModelError
from parley.exporting.trained_model import open_run
from parley.exporting.weights import CheckpointWeights

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def quantized_base(
    build_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A tiny Llama as bitsandbytes saves it."""

    def build(kind: str) -> Path:
        source, folder = build_family("llama"), tmp_path_factory.mktemp("quantized") / kind
        quantization = BitsAndBytesConfig(**KINDS[kind])
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_weights_are_merged_into_and_it_is_said(
    kind: str, quantized_base: Callable[[str], Path], build_run: Callable[..., Path], tmp_path: Path
) -> None:
    (done,) = parley.export(build_run(quantized_base(kind)), "merged", "f32", output=tmp_path / "out")
    assert any(f"merged into dequantised {kind} weights" in note for note in done.record.notes)
    assert f"dequantised {kind}" in (done.folder / "README.md").read_text(encoding="utf-8")
    assert done.record.figures is not None
    if kind != "int8":  # bitsandbytes rounds the inputs of int8 layers as well
        assert done.record.status == "verified", done.record.figures
    assert done.record.figures.mean_kl is not None
    assert done.record.figures.mean_kl < 1e-3
    assert "quantization_config" not in (done.folder / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "bias"), [("nf4", 0.02), ("fp4", 0.03), ("int8", 0.002)])
def test_a_dequantised_matrix_is_the_original_without_a_bias(
    kind: str, bias: float, quantized_base: Callable[[str], Path], build_family: Callable[[str], Path]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    original = load_file(build_family("llama") / "model.safetensors")[name]
    got = CheckpointWeights(quantized_base(kind)).get(name)
    assert got.dtype == torch.float32
    slope = (got * original).sum() / (original * original).sum()
    assert abs(slope.item() - 1) < bias
    assert (got - original).norm() < 0.15 * original.norm()


def test_the_16_bit_original_takes_its_place(
    quantized_base: Callable[[str], Path],
    build_run: Callable[..., Path],
    build_family: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run, original = build_run(quantized_base("nf4")), build_family("llama")
    (done,) = parley.export(run, "merged", "f32", base=str(original), output=tmp_path / "out")
    assert done.record.status == "verified"
    assert done.record.base == "llama"
    norms = load_file(original / "model.safetensors")
    merged = load_file(done.folder / "model.safetensors")
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], norms["model.layers.0.mlp.up_proj.weight"])


def test_another_model_does_not(
    quantized_base: Callable[[str], Path],
    build_run: Callable[..., Path],
    build_family: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run, other = build_run(quantized_base("nf4")), Path(shutil.copytree(build_family("llama"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: value.flip(0) for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="is not the model that the run's base was quantised from"):
        parley.export(run, "merged", base=str(other))


def test_a_base_quantised_while_loading_is_merged_as_16_bit(build_run: Callable[..., Path], tmp_path: Path) -> None:
    run = build_run("llama")
    settings = (run / "run.yaml").read_text(encoding="utf-8")
    (run / "run.yaml").write_text(settings.replace("quantization: auto", "quantization: nf4"), encoding="utf-8")
    trained = open_run(run)
    assert any("merged into the 16-bit base; training rounded it to nf4" in note for note in trained.notes)
    assert parley.export(run, "merged", "f32", output=tmp_path / "out")[0].record.status == "verified"
