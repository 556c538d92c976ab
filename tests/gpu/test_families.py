"""Every declared family on a GPU: gradients against autograd, replayed decode steps against plain ones.

In bfloat16 heads have the sizes of the published models: 256 (Gemma), 96, 128 of which 96 rotate (Phi), 64. In float32,
whose products Triton unrolls without tensor cores, they have 32, and 24 where they are no power of two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.gpu.test_decoder import GREEDY, answers, questions
from tests.gpu.test_fused_step import autograd_gradient, documents, exact_gradient, fused_gradient
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.inference.decoder import StaticCacheDecoder
from parley.train_step.bind import bind
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCABULARY = 1000
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 50},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 50, "query_pre_attn_scalar": 224, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 50, "sliding_window_pattern": 2, "num_key_value_heads": 1},
    "phi3": {},
    "phi3 longrope": {"original_max_position_embeddings": 100},
    "phi3 partial": {"rope_parameters": PARTIAL},
    "granite": {"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo2": {},
}
PUBLISHED_HEADS = {
    "gemma2": 256,
    "gemma3_text": 256,
    "phi3": 96,
    "phi3 longrope": 96,
    "phi3 partial": 128,
    "qwen3": 128,
}


def longrope(head_dim: int) -> dict[str, Any]:
    half = head_dim // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [1.0 + i / 8 for i in range(half)]}
    return {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 100} | factors


def family(name: str, dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    head_dim = PUBLISHED_HEADS.get(name, 64)
    if dtype == torch.float32:
        head_dim = 24 if head_dim == 96 else 32
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 4 * head_dim, "intermediate_size": 704, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "max_position_embeddings": 4096,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    if name == "phi3 longrope":
        sizes["rope_parameters"] = longrope(head_dim)
    config = CONFIG_MAPPING[name.split()[0]](**sizes | FAMILIES[name])
    # transformers 5.17 runs Gemma 2 through an attention without soft caps unless told otherwise.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").to("cuda")
    for parameter in model.parameters():
        parameter.data.mul_(2).add_(torch.randn_like(parameter), alpha=0.02)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.02)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    examples, model = documents((3, 70, 1, 129, 64)), family(name, torch.float32)
    loss, gradient = fused_gradient(FusedStep(bind(model), MemoryPlan(positions=256)), model, examples)
    model.zero_grad()
    wanted_loss, wanted = exact_gradient(model, examples)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_rounds_no_more_than_in_transformers(name: str) -> None:
    """With heads of the published sizes, against float32 on the same weights."""
    examples, model = documents((3, 70, 1, 129, 64)), family(name, torch.bfloat16)
    loss, gradient = fused_gradient(FusedStep(bind(model), MemoryPlan(positions=256)), model, examples)
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        plain_loss, plain = autograd_gradient(model, examples)
    model.zero_grad()
    exact_loss, exact = exact_gradient(model, examples)
    error, plain_error = ((got - exact).norm() / exact.norm() for got in (gradient, plain))
    assert float(error) < 1.5 * float(plain_error) + 0.01
    assert abs(loss - exact_loss) < 1.5 * abs(plain_loss - exact_loss) + 2e-3 * exact_loss


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_decode_steps_say_what_plain_ones_say(name: str) -> None:
    model = family(name, torch.float32).eval()
    requests = questions(GREEDY, lengths=(1, 40, 7, 60, 33))
    for request in requests:
        request.prompt_ids[:] = [token % VOCABULARY for token in request.prompt_ids]
    for slots in (1, 5):
        got = answers(StaticCacheDecoder.of(model, slots=slots, length=100), requests)
        assert got == answers(StaticCacheDecoder.of(model, slots=slots, length=100, eager=True), requests)
