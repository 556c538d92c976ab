"""Merging tensor by tensor against PEFT's own merge of the whole model, for each kind of adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import parley
from parley.errors import ModelError
from parley.exporting.trained_model import open_run

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"down_proj": 3}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "trained tokens": {"trainable_token_indices": [7, 9]},
}
BIASES: dict[str, dict[str, Any]] = {
    "bias of the adapter": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "biases of the base": {"bias": "all"},
    "biases of adapted modules": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", [*ADAPTERS, *BIASES])
def test_merged_tensors_are_peft_s(kind: str, build_run: Callable[..., Path]) -> None:
    family = "qwen2" if kind in BIASES else "llama"
    trained = open_run(build_run(family, **(ADAPTERS | BIASES)[kind]))
    merged = trained.load(torch.float32).merge_and_unload(safe_merge=True)
    wanted = merged.state_dict()
    assert list(trained.weights.shapes()) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(trained.weights.get(name).float(), value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_a_head_that_training_parted_from_the_embedding_is_written(
    lora: dict[str, Any], tied: bool, tied_llama: Path, build_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = build_run(tied_llama, **lora)
    merged, gguf = parley.export(run, ["merged", "gguf"], "f32", output=tmp_path / "out")
    assert [merged.record.status, gguf.record.status] == ["verified", "verified"], merged.record.figures
    assert ("lm_head.weight" in load_file(merged.folder / "model.safetensors")) is not tied


def test_shards_are_indexed_and_read_back(
    build_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.exporting.merged.SHARD_BYTES", 100_000)
    (done,) = parley.export(build_run("llama"), "merged", output=tmp_path / "out")
    assert done.record.status == "verified"
    shards = sorted(done.folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (done.folder / "model.safetensors.index.json").is_file()
    assert all(shard.stat().st_size < 200_000 for shard in shards)


def test_the_base_s_type_is_kept_and_another_can_be_had(run: Path, tmp_path: Path) -> None:
    default, half = (
        parley.export(run, "merged", [], output=tmp_path / "a"),
        parley.export(run, "merged", "bf16", output=tmp_path / "b", verify=False),
    )
    assert {value.dtype for value in load_file(default[0].folder / "model.safetensors").values()} == {torch.float32}
    assert {value.dtype for value in load_file(half[0].folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication cannot be merged tensor by tensor"),
        ({"init_lora_weights": "pissa"}, "moved a part of the base into the adapter"),
    ],
)
def test_an_adapter_that_is_more_than_single_modules_is_refused(
    run: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import json

    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    path = copied / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        parley.export(copied, "merged", verify=False)
    assert not (copied / "exports").exists()


def test_a_full_fine_tune_is_exported_whole(build_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "full"
    trained = open_run(build_run("llama"))
    shutil.copytree(trained.folder.path, run)
    trained.load(torch.float32).merge_and_unload().save_pretrained(run / "model")
    trained.tokenizer.save_pretrained(run / "model")
    shutil.rmtree(run / "adapter")
    merged, gguf = parley.export(run, ["merged", "gguf"], "f16", output=tmp_path / "out")
    assert [merged.record.status, gguf.record.status] == ["verified", "verified"]
    assert merged.record.base is None
    with pytest.raises(ModelError, match="every weight was trained, so there is no adapter"):
        parley.export(run, "adapter")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    build_family: Callable[[str], Path], build_run: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(build_family("llama"), base)
    run = build_run(base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (run / "base.json").unlink()  # else the base is refused as another one
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        parley.export(run, "merged", verify=False)
    assert not (run / "exports").exists()
