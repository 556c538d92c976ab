"""Every family that Parley trains in every form: each export read back by another program and verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import parley
from parley.exporting.registry import EXPORTERS
from parley.models.families import FAMILIES

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
# What llama.cpp has built in where a configuration has a choice, and factors that are not one.
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6},
    "qwen3": {"head_dim": 16},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_multiplier": 0.2,
    },
    "smollm3": {"num_hidden_layers": 4},
}  # fmt: skip
TARGETS = {"phi3": ["qkv_proj", "down_proj"]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_exported_and_verified_in_every_form(
    model_type: str,
    tiny_tokenizer: Any,
    build_run: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    special = {
        "vocab_size": len(tiny_tokenizer) + 16, "bos_token_id": tiny_tokenizer.bos_token_id,
        "eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id,
    }  # fmt: skip
    base = tmp_path / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[model_type](**SHAPE | special | SETTINGS.get(model_type, {}))
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    run = build_run(base, target_modules=TARGETS.get(model_type, ["q_proj", "k_proj", "down_proj"]))
    done = parley.export(run, list(EXPORTERS), "f32", output=tmp_path / "out")
    assert [each.record.target for each in done] == list(EXPORTERS)
    for each in done:
        assert each.record.status == "verified", (each.record.name, each.record.figures)
    record_property("family", model_type)  # for the table of docs/families.md
    record_property("verified_forms", len(done))
