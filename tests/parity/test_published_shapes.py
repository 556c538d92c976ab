"""Each published member of each family, small: training and answers against transformers, PEFT and autograd in float32.

A family's members differ in details of their configuration: tied heads, biases, windows, heads of another size, rotary
scaling. One packed row of odd lengths trains on the fused step as its documents do alone through transformers, and
64 greedy tokens are transformers' own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.config import GenerationSection
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.interface import DecodeRequest
from parley.train_step.bind import bind
from parley.train_step.captured_step import CapturedStep
from parley.train_step.fused_step import FusedStep
from parley.train_step.memory_plan import MemoryPlan

VOCABULARY, TOKENS = 131, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (1, 17, 5, 29, 2, 40)
PROMPTS = ([5, 9, 7], [(7 * i) % 120 + 3 for i in range(21)])


def llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip


def longrope(rotated: int, **more: Any) -> dict[str, Any]:
    half = rotated // 2
    return {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)], "long_factor": [2.0 + i for i in range(half)],
    } | more  # fmt: skip


# Heads have 16 elements. "window": shorter than the longest documents and prompts.
WINDOW = {"sliding_window": 7}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, TinyLlama, Yi, Vicuna": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "Llama 2 7B: as many key-value heads": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Llama 3.1, R1-Distill-Llama": ("llama", {"rope_parameters": llama3(8.0), "tie_word_embeddings": False}),
    "Llama 3.2": ("llama", {"rope_parameters": llama3(32.0), "tie_word_embeddings": True}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 3,
                          "hidden_size": 96}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "Mistral 7B 0.1": ("mistral", WINDOW),
    "Mistral 7B 0.3": ("mistral", {"sliding_window": None}),
    "Mistral Nemo: wide heads": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "Qwen 2.5 0.5B to 3B": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False,
                                      "sliding_window": 7, "max_window_layers": 1}),
    "Qwen 2.5 7B to 72B, R1-Distill-Qwen": ("qwen2", {"tie_word_embeddings": False, "use_sliding_window": False,
                                                      "sliding_window": 7, "num_key_value_heads": 1}),
    "Qwen 2.5 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Qwen 2.5, YaRN": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                                     "original_max_position_embeddings": 64}}),
    "Qwen 3 0.6B to 4B": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "Qwen 3 8B to 32B": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "Qwen 3 with biases and windows": ("qwen3", {"attention_bias": True, "use_sliding_window": True,
                                                 "sliding_window": 7, "max_window_layers": 1, "head_dim": 16}),
    "Gemma 2": ("gemma2", WINDOW | {"head_dim": 24, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0,
                                    "final_logit_softcapping": 5.0}),
    "Gemma 3 270M, 1B": ("gemma3_text", WINDOW | {"head_dim": 24, "sliding_window_pattern": 2,
                                                  "num_key_value_heads": 1}),
    "Gemma 3 4B to 27B, text": ("gemma3_text", WINDOW | {
        "head_dim": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 9,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    }),
    "Phi-3 mini 4k": ("phi3", WINDOW | {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Phi-3.5 mini, Phi-3 128k": ("phi3", {"num_key_value_heads": 4, "tie_word_embeddings": False,
                                          "rope_parameters": longrope(16)}),
    "Phi-4, 14B: 4 query heads a key-value head": ("phi3", {"num_attention_heads": 8, "num_key_value_heads": 2,
                                                            "hidden_size": 128, "tie_word_embeddings": False}),
    "Phi-4-mini": ("phi3", {"tie_word_embeddings": True, "rope_parameters": longrope(12, partial_rotary_factor=0.75)}),
    "Granite 3": ("granite", {"tie_word_embeddings": True, "embedding_multiplier": 3, "residual_multiplier": 0.4,
                              "logits_scaling": 2, "attention_multiplier": 0.3}),
    "SmolLM3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "SmolLM3 with windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
                                         "no_rope_layers": [0, 1], "attention_bias": True}),
    "OLMo 2": ("olmo2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}  # fmt: skip


def build(name: str, switch: int) -> PeftModel:
    """`switch`: the most tokens for which longrope takes its short factors."""
    torch.manual_seed(0)
    model_type, settings = SHAPES[name]
    rope = settings.get("rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        settings = settings | {
            "original_max_position_embeddings": switch,
            "rope_parameters": rope | {"original_max_position_embeddings": switch},
        }
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**SIZES | settings), dtype=torch.float32, attn_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_row_trains_as_its_documents_alone(
    name: str, make_examples: Any, plain_gradient: Any, record_property: Any
) -> None:
    """On the fused step and the captured path. What is recorded is in the table of families (family_parity.py)."""
    model, documents = build(name, switch=20), make_examples(LENGTHS)
    loss, wanted = plain_gradient(model, documents)
    record_property("family", SHAPES[name][0])
    count = sum(document.supervised_tokens for document in documents)
    if "longrope" not in str(SHAPES[name][1]):  # there, a captured row takes the factors of one length
        captured = CapturedStep(model, tokens=1000)
        captured.forward_backward(documents, count)
        assert float(captured.metrics_3[0]) == pytest.approx(loss, rel=1e-5)
        record_property("captured_gradient_error", checked_error(model, wanted))
        model.zero_grad()
    step = FusedStep(bind(model), MemoryPlan())
    step.forward_backward(documents, count)
    step.bound.flat.expose_gradients()
    assert float(step.metrics_3[0]) == pytest.approx(loss, rel=1e-5)
    record_property("fused_gradient_error", checked_error(model, wanted))


def checked_error(model: PeftModel, wanted: dict[str, torch.Tensor]) -> float:
    """The relative difference of all gradients as one vector; that of each parameter is below 1e-4."""
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-4, name
    squares = [((got[name] - gradient).square().sum(), gradient.square().sum()) for name, gradient in wanted.items()]
    difference, whole = torch.tensor(squares).sum(0)
    return float((difference / whole).sqrt())


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_answers_are_transformers_own(name: str, record_property: Any) -> None:
    model = build(name, switch=500)
    decoder = StaticCacheDecoder.of(model, slots=len(PROMPTS), length=128)
    settings = GenerationSection(temperature=0, max_new_tokens=TOKENS)
    decoder.admit({slot: DecodeRequest(prompt, settings, frozenset(), 0) for slot, prompt in enumerate(PROMPTS)})
    answers: list[list[int]] = [[] for _ in PROMPTS]
    while emitted := decoder.decode():
        for slot, tokens in emitted.items():
            answers[slot] += [token.id for token in tokens]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == TOKENS
        # Each token is the likeliest after those before it, so one forward pass shows what `generate` would write.
        with torch.no_grad():
            likeliest_L = model(torch.tensor([prompt + answer])).logits[0].argmax(-1)
        assert answer == likeliest_L[len(prompt) - 1 : -1].tolist()
    record_property("family", SHAPES[name][0])
    record_property("greedy_tokens", sum(map(len, answers)))
