"""What is refused before a sharded model is made, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from parley.errors import ModelError
from parley.models.load_sharded import SafetensorsSource
from parley.models.sharding import empty_model


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def check(folder: Path) -> None:
    model = empty_model(AutoConfig.from_pretrained(folder), torch.float32, nf4=True, double=True)
    SafetensorsSource(folder, "mine").check(model)


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


def test_a_whole_checkpoint_is_accepted(folder: Path) -> None:
    check(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ModelError, match=r"has no tensor model.layers.1.mlp.up_proj.weight"):
        check(folder)


def test_another_shape_is_named(folder: Path) -> None:
    rewrite(folder, "model.layers.0.mlp.up_proj.weight", torch.zeros(4, 4))
    with pytest.raises(ModelError, match=r"up_proj.weight has shape \[4, 4\] and config.json describes \[128, 64\]"):
        check(folder)


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="are damaged"):
        check(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors; sharding reads"):
        check(folder)


def test_a_matrix_that_is_no_whole_number_of_blocks(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(values | {"hidden_size": 12, "intermediate_size": 10, "head_dim": 4})
    )
    with pytest.raises(ModelError, match="no multiple of the 64 of an NF4 block"):
        check(folder)
