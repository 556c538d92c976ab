"""`--to mlx`: adapters in mlx-lm's layout, whose weights by its formula are PEFT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import parley
from parley.errors import ModelError
from parley.exporting.mlx import MlxAdapterReader, selected_modules
from parley.exporting.trained_model import open_run

MODULES = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]


def settings_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (done,) = parley.export(run, "mlx", output=tmp_path_factory.mktemp("mlx") / "out")
    assert done.record.status == "verified", done.record.figures
    assert done.command is not None
    assert done.command.startswith("mlx_lm.server --model ")
    assert f"--adapter-path {done.folder}" in done.command
    assert "--temp 1.5 --top-p 1.0 --top-k 0 --min-p 0.1" in done.command
    assert done.command.endswith(f'--chat-template "$(cat {done.folder}/chat_template.jinja)"')
    return done.folder


def test_the_folder_has_mlx_lms_layout(folder: Path) -> None:
    settings = settings_of(folder)
    assert settings["fine_tune_type"] == "lora"
    assert settings["num_layers"] == 2
    assert settings["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": MODULES}
    tensors = load_file(folder / "adapters.safetensors")
    assert set(tensors) == {
        f"model.layers.{layer}.{module}.{matrix}"
        for layer in range(2)
        for module in MODULES
        for matrix in ("lora_a", "lora_b")
    }
    a, b = (tensors[f"model.layers.0.mlp.down_proj.{matrix}"] for matrix in ("lora_a", "lora_b"))
    assert a.shape[1] == b.shape[0] == 4


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 5}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0]},
    ],
    ids=["rslora", "dora", "patterns", "last layer", "first layer"],
)
def test_the_weights_are_pefts(build_run: Callable[..., Path], lora: dict[str, Any], tmp_path: Path) -> None:
    (done,) = parley.export(build_run("llama", **lora), "mlx", output=tmp_path / "out")
    assert done.record.status == "verified", done.record.figures
    assert done.record.figures is not None
    assert done.record.figures.worst_logit is not None
    assert done.record.figures.worst_logit < 1e-3


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_other_families(build_run: Callable[..., Path], family: str, tmp_path: Path) -> None:
    (done,) = parley.export(build_run(family), "mlx", output=tmp_path / "out")
    assert done.record.status == "verified", done.record.figures


def test_a_wrong_scale_or_a_stray_tensor_is_found(run: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    settings = settings_of(copy)
    settings["lora_parameters"]["scale"] *= 1.01
    (copy / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match="another weight than PEFT"):
        MlxAdapterReader(open_run(run), copy, torch.float32)
    shutil.copyfile(folder / "adapter_config.json", copy / "adapter_config.json")
    tensors = load_file(copy / "adapters.safetensors")
    save_file({**tensors, "lm_head.lora_a": torch.ones(1)}, copy / "adapters.safetensors")
    with pytest.raises(ModelError, match=r"mlx-lm would refuse lm_head\.lora_a"):
        MlxAdapterReader(open_run(run), copy, torch.float32)


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "no modules_to_save"),
        ({"bias": "all"}, "no bias: all"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"no lm_head\.weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"no model\.embed_tokens\.weight"),
    ],
)
def test_what_mlx_lms_adapters_lack_is_refused(
    build_run: Callable[..., Path], lora: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"mlx-lm's adapters have {named}.*use --to merged"):
        parley.export(build_run("llama", **lora), "mlx", output=tmp_path / "out", verify=False)


def test_a_vocabulary_that_training_changed_is_refused(run: Path, tmp_path: Path) -> None:
    trained = open_run(run)
    trained.tokenizer.add_tokens(["<new>"])
    from parley.exporting.mlx import MlxExporter

    with pytest.raises(ModelError, match="takes the base's tokenizer, and training changed its vocabulary"):
        MlxExporter().check(trained, None)


def test_modules_are_chosen_as_mlx_lm_chooses_them() -> None:
    names = ["model.embed_tokens", *(f"model.layers.{i}.{m}" for i in range(3) for m in ("a.q", "a.k")), "lm_head"]

    def chosen(layers: int, *keys: str) -> list[str]:
        return selected_modules(names, {"num_layers": layers, "lora_parameters": {"keys": keys}})

    assert chosen(2, "a.q") == ["model.layers.1.a.q", "model.layers.2.a.q"]
    assert chosen(0, "a.k") == [f"model.layers.{i}.a.k" for i in range(3)]
    assert chosen(3, "model.layers.0.a.k") == ["model.layers.0.a.k"]
