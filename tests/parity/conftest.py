"""Tiny models of the families the fast step knows, with adapters that already say something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.config import LLAMA_PROJECTIONS
from parley.data.packing import Document
from parley.library_compat.bitsandbytes import keep_trainable_layout

VOCABULARY = 131
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# transformers 5.17 runs Gemma 2 through an attention without soft caps unless told otherwise.
ATTENTION = {"gemma2": "eager"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 0.7},
    "gemma3_text": {"head_dim": 8, "sliding_window": 7, "sliding_window_pattern": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "phi3_longrope": {
        # 29 tokens are past the switch, the other documents of `examples` are not.
        "original_max_position_embeddings": 20,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 20,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [2.0, 3.0, 4.0],
        },
    },
    "granite": {"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 2, "attention_multiplier": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
}


def family(
    name: str,
    targets: list[str] | str | None = None,
    layers: int = 2,
    nf4: Literal["single", "double"] | None = None,
    **lora: Any,
) -> PeftModel:
    """Odd sizes on purpose; every weight, norms and biases too, is off its usual start.

    `nf4` quantises the base's projections as bitsandbytes does, without or with quantised block scales. Their columns
    are multiples of 64 then: of others bitsandbytes 0.50 on a CPU reads the wrong scales.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 104, "num_attention_heads": 6}
    if nf4 is not None:
        sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}
    config = CONFIG_MAPPING[name.removesuffix("_longrope")](
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        tie_word_embeddings=False,
        **sizes | FAMILIES[name],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION.get(name))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    if nf4 is not None:
        quantise(model, double=nf4 == "double")
    lora = {"r": 5, "lora_alpha": 7} | lora
    model = get_peft_model(
        model, LoraConfig(target_modules=targets or list(LLAMA_PROJECTIONS), task_type="CAUSAL_LM", **lora)
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.1)
    return model


def quantise(model: nn.Module, *, double: bool) -> None:
    """Replace every projection by bitsandbytes' 4-bit one, computing in float32."""
    for path in [name for name, _ in model.named_modules() if name.endswith("_proj")]:
        linear = model.get_submodule(path)
        bias = linear.bias is not None
        packed = Linear4bit(linear.in_features, linear.out_features, bias, torch.float32, double, "nf4")
        packed.load_state_dict(linear.state_dict())
        model.set_submodule(path, packed.to("cpu"))  # the move quantises
    keep_trainable_layout(model)


def examples(lengths: tuple[int, ...] = (1, 17, 5, 29), seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        ids = rng.integers(0, VOCABULARY, length)
        made.append(Document.from_lists(ids, np.where(rng.random(length) < 0.5, ids, -100)))
    return made


def plain(model: PeftModel, documents: list[Document]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss, and the gradient of its weighted mean over supervised tokens, by transformers, PEFT and autograd."""
    count = sum(document.loss_weight for document in documents)
    loss = torch.zeros(())
    for document in documents:
        logits_LV = model(torch.tensor(document.ids_L).long()[None]).logits[0, :-1]
        target_L = torch.tensor(document.label_L[1:]).long()
        loss_L = functional.cross_entropy(logits_LV, target_L, ignore_index=-100, reduction="none")
        loss = loss + loss_L @ torch.tensor(document.with_weights().weight_L[1:])
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
