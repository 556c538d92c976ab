"""Model folders without weights, settings, rows and GPUs for plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from parley.config import RunConfig
from parley.training.plan.device import PlanDevice
from parley.training.plan.planner import Data
from parley.units import GIB

SHAPE: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 5,
}  # fmt: skip
BIG = SHAPE | {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4,
    "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
ROWS = Data(np.array([512, 300, 100] * 20), 60)


@pytest.fixture(scope="session")
def model_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model folder without weights, one for each shape, so that its plans share a model; read-only."""
    made: dict[str, Path] = {}

    def make(**values: Any) -> Path:
        key = json.dumps(values, sort_keys=True)
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp("planned") / "model", tiny_tokenizer, values)
        return made[key]

    return make


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Makes the same in the test's own folder."""
    return lambda **values: _save(tmp_path / "model", tiny_tokenizer, values)


def _save(path: Path, tokenizer: Any, values: dict[str, Any]) -> Path:
    LlamaConfig(**(SHAPE | values), architectures=["LlamaForCausalLM"]).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def gpu(gib: float, count: int = 1) -> PlanDevice:
    device = PlanDevice(f"a GPU of {gib} GiB", "cuda", int(gib * GIB), int(gib * GIB), 2**29, True, int(gib * GIB))
    return replace(device, count=count)


def settings(model: Path, *overrides: str, **sections: Any) -> RunConfig:
    values = {"model": {"name": str(model), "max_seq_length": 512}, "output": str(model.parent / "runs" / "x")}
    return RunConfig.create(values | sections, overrides)
