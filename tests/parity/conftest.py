"""Tiny models of the families the fast step knows, with adapters that already say something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.config import LLAMA_PROJECTIONS
from parley.data.packing import Document

VOCABULARY = 131
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}


def family(name: str, targets: list[str] | None = None, layers: int = 2, **lora: Any) -> PeftModel:
    """Odd sizes on purpose; every weight, norms and biases too, is off its usual start."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=104,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **FAMILIES[name],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    lora = {"r": 5, "lora_alpha": 7} | lora
    model = get_peft_model(
        model, LoraConfig(target_modules=targets or list(LLAMA_PROJECTIONS), task_type="CAUSAL_LM", **lora)
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.1)
    return model


def examples(lengths: tuple[int, ...] = (1, 17, 5, 29), seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(0, VOCABULARY, length)
        made.append(Document.from_lists(ids, np.where(rng.random(length) < 0.5, ids, -100)))
    return made


def plain(model: PeftModel, documents: list[Document]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss, and the gradient of its mean over supervised tokens, through transformers, PEFT and autograd."""
    count = sum(document.supervised_tokens for document in documents)
    loss = torch.zeros(())
    for document in documents:
        logits_LV = model(torch.tensor(document.ids_L).long()[None]).logits[0, :-1]
        target_L = torch.tensor(document.label_L[1:]).long()
        loss = loss + functional.cross_entropy(logits_LV, target_L, ignore_index=-100, reduction="sum")
    (loss / count).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


@pytest.fixture
def build_adapted() -> Callable[..., PeftModel]:
    """`family`: a tiny model of a family by name, with LoRA on `targets`."""
    return family


@pytest.fixture
def make_examples() -> Callable[..., list[Document]]:
    return examples


@pytest.fixture
def plain_gradient() -> Callable[..., tuple[float, dict[str, torch.Tensor]]]:
    return plain
