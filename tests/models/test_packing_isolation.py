"""Which models may be trained on packed rows: shown by the probe, and held against a packed row of the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from parley.data.packing import Document, padding_free_row
from parley.models import packing_isolation
from parley.models.packing_isolation import why_not_packed

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 128,
    "initializer_range": 0.2,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

ISOLATED: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 20}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "phi": {}, "phi3": {}, "granite": {}, "olmo2": {}, "olmo3": {}, "cohere2": {}, "starcoder2": {},
    "stablelm": {}, "smollm3": {}, "ernie4_5": {}, "glm4": {}, "gpt2": {}, "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "llama yarn": {"rope_parameters": YARN},
}  # fmt: skip
LEAKING: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},  # learned positions, counted from the attention mask
    "xglm": {"d_model": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2 late": {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 5 + ["conv"]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bloom": {"n_head": 4},  # ALiBi, without position_ids
    "mamba": {}, "mamba2": {"num_heads": 8, "head_dim": 16}, "rwkv": {"attention_hidden_size": 64},
    "llama dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
    "phi3 longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
}  # fmt: skip


def build(name: str, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **SIZES | config)).eval()


def spread(model: nn.Module, *, longest: int) -> float:
    """How much a short document's logits change in a packed row when its neighbour is another or a longer one."""
    rng = np.random.default_rng(0)
    short = rng.integers(10, 60, 6)
    neighbours = [rng.integers(10, 60, length) for length in (5, 5, longest)]
    logits = []
    for neighbour in neighbours:
        row = padding_free_row([Document.from_lists(ids, ids) for ids in (neighbour, short)])
        del row["labels"]
        with torch.no_grad():
            logits.append(model(**row, use_cache=False).logits[0, -6:])
    return max(float((other - logits[0]).abs().max()) for other in logits[1:])


@pytest.mark.parametrize("name", ISOLATED)
def test_models_that_isolate_documents_are_packed(name: str) -> None:
    model = build(name, ISOLATED[name])
    assert why_not_packed(model) is None
    assert spread(model, longest=40) < 1e-4


@pytest.mark.parametrize("name", LEAKING)
def test_models_whose_documents_see_each_other_are_not_packed(name: str) -> None:
    model = build(name, LEAKING[name])
    reason = why_not_packed(model)
    assert reason is not None
    assert "could not" not in reason
    if "takes no position_ids" not in reason:
        assert "see each other" in reason
        assert spread(model, longest=40) > 1e-2


@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_rope_that_depends_on_the_length_isolates_documents_that_are_short_enough(name: str) -> None:
    model = build(name, LEAKING[name])
    assert why_not_packed(model, max_tokens=32) is None
    assert spread(model, longest=32) < 1e-4
    assert "see each other" in str(why_not_packed(model, max_tokens=33))


def test_the_probe_runs_once_for_a_model_and_its_adapters_and_leaves_the_random_state() -> None:
    packing_isolation._probe.cache_clear()
    model = build("llama", {"num_hidden_layers": 3})
    state = torch.random.get_rng_state()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    after_peft = torch.random.get_rng_state()
    assert why_not_packed(adapted) is None
    assert why_not_packed(model) is None
    assert torch.equal(torch.random.get_rng_state(), after_peft)
    assert not torch.equal(state, after_peft)
    assert packing_isolation._probe.cache_info().misses == 1
    assert why_not_packed(build("llama", {"num_hidden_layers": 3, "hidden_act": "gelu"})) is None
    assert packing_isolation._probe.cache_info().misses == 2


class Extra(nn.Module):
    """A layer that the small shape of its model does not have."""


class LargeAlone(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        if config.num_attention_heads > 4:
            self.extra = Extra()


class NotANumber(LlamaForCausalLM):
    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, position_ids=position_ids, **kwargs)
        output.logits = output.logits * float("nan")
        return output


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        (LargeAlone, "packing could not be tried on a small LargeAlone (ValueError: it has no Extra)"),
        (NotANumber, "documents of a packed row see each other in NotANumber"),
    ],
)
def test_what_is_not_shown_is_not_packed(architecture: type[nn.Module], reason: str) -> None:
    config = LlamaConfig(**SIZES | {"num_attention_heads": 8})
    assert why_not_packed(architecture(config)) == reason


def test_what_is_no_transformers_model_is_not_packed() -> None:
    assert why_not_packed(nn.Linear(2, 2)) == "packing was not tried, since Linear is no transformers model"


@pytest.mark.parametrize(
    ("name", "experts"),
    [("qwen3_moe", "num_local_experts"), ("mixtral", "num_local_experts"), ("glm4_moe", "n_routed_experts")],
)
def test_rounding_chooses_no_other_expert(name: str, experts: str) -> None:
    """Among 128 experts the eighth and the ninth differ by less than bfloat16's rounding."""
    config = AutoConfig.for_model(name)
    small = packing_isolation.shrink(config, 1024, few_layers=True)
    assert getattr(small, experts) == small.num_experts_per_tok < getattr(config, experts)
    model = AutoModelForCausalLM.from_config(small).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert packing_isolation._largest_difference(model, torch.device("cpu")) < 0.015


def test_the_probe_shrinks_the_configurations_inside_of_one() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 4}, vision_config={})
    small = packing_isolation.shrink(config, None, few_layers=True)
    assert small.text_config.vocab_size == packing_isolation.VOCABULARY
    assert small.text_config.intermediate_size == packing_isolation.WIDTH
    assert small.text_config.sliding_window == packing_isolation.WINDOW
