"""Each architecture in GGUF against transformers: llama.cpp generates the same 64 tokens from float32 weights."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from parley.errors import ModelError
from parley.exporting.gguf.architectures import ARCHITECTURES, architecture_of, check_tensors, context_length
from parley.exporting.gguf.convert import write_gguf
from parley.exporting.gguf.quantization import SCHEMES
from parley.exporting.gguf.vocabulary import read_vocabulary
from parley.exporting.merge import merged_weights
from parley.exporting.weights import CheckpointWeights
from parley.library_compat.xllamacpp import LlamaModel
from parley.models.families import FAMILIES

TOKENS, PROMPT = 64, 24
SHAPE = {
    "vocab_size": 400,  # rows to spare after the tokenizer's 384
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # peaked enough that rounding decides no token
}
ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = ROPE | {"rope_type": "linear", "factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = ROPE | {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads wider than the hidden size": ("llama", {"head_dim": 32}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "phi3": ("phi3", {}),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    ),
    "granite": ("granite", GRANITE),
    "granite, untied head, biases, llama3 rope": (
        "granite",
        GRANITE | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3, untied head, yarn": (
        "smollm3",
        {"num_hidden_layers": 4, "tie_word_embeddings": False, "rope_parameters": YARN},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, tied head, linear rope": (
        "olmo2",
        {"tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "gemma3, untied head": ("gemma3_text", GEMMA | {"tie_word_embeddings": False, "num_hidden_layers": 6}),
    "phi4 mini": (
        "phi3",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
    ),
}


def build(model_type: str, settings: dict[str, Any], folder: Path) -> Any:
    """A random model in `folder`, with biases that are not zero and norms that are not one."""
    config = CONFIG_MAPPING[model_type](**SHAPE | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def greedy_ids(path: Path, prompt: list[int]) -> list[int]:
    """TOKENS tokens after `prompt`, from llama.cpp's server."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    body = {"prompt": prompt, "temperature": 0, "n_predict": TOKENS, "return_tokens": True}
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return list(json.load(response)["tokens"])


@torch.inference_mode()
def clearest_path(model: Any, case: str) -> tuple[list[int], Any]:
    """Of 32 random prompts with their greedy continuations, the ids whose likeliest tokens are least of a tie.

    Also returns the logits (L, V). llama.cpp keeps keys, values and attention in 16 bits on a CPU, which breaks ties.
    """
    generator = random.Random(case)
    prompts = torch.tensor([generator.choices(range(6, 384), k=PROMPT) for _ in range(32)])
    ids_BL = model.generate(prompts, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None)
    logits_BLV = model(ids_BL).logits
    best_BL2 = logits_BLV[:, PROMPT - 1 : -1].topk(2).values
    margins_B = (best_BL2[..., 0] - best_BL2[..., 1]).amin(-1)
    ends = (ids_BL[:, PROMPT:] < 6).any(-1)  # control tokens would end the answer
    path = int(margins_B.masked_fill(ends, -1).argmax())
    return ids_BL[path].tolist(), logits_BLV[path].numpy()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_generates_what_transformers_does(
    case: str, tiny_tokenizer: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = build(*CASES[case], tmp_path)
    config = model.config
    architecture = architecture_of(config, case)
    weights = merged_weights(config, CheckpointWeights(tmp_path), [])
    vocabulary = read_vocabulary(tiny_tokenizer, config.vocab_size, [], case)
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, config, weights, vocabulary, SCHEMES["f32"], {"type": "model"}, threads=1)
    ids, wanted = clearest_path(model, case)
    reader = LlamaModel(path, length=256, threads=1)
    try:
        logits = reader.logits(ids, range(len(ids)))
    finally:
        reader.close()
    assert abs(logits - wanted).max() < 0.02 * wanted.std()
    assert greedy_ids(path, ids[:PROMPT]) == ids[PROMPT:]
    record_property("family", config.model_type)  # benchmarks/family_parity.py writes docs/families.md from these
    record_property("equal_tokens", len(ids) - PROMPT)


def test_a_window_that_llama_cpp_lacks_limits_the_context() -> None:
    config = CONFIG_MAPPING["mistral"](**SHAPE | {"sliding_window": 16})
    assert context_length(config, architecture_of(config, "mistral")) == 16
    config = CONFIG_MAPPING["gemma2"](**SHAPE | GEMMA)
    assert context_length(config, architecture_of(config, "gemma2")) == 256


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("gpt2", {}, "gpt2 models are not exported to GGUF; Parley knows gemma2"),
        ("llama", {"hidden_act": "gelu"}, "the activation gelu, where llama.cpp computes silu"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99 and llama.cpp computes with 32"),
        ("gemma2", GEMMA | {"layer_types": ["full_attention"] * 2}, "its layer_types do not alternate"),
        ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 2}, "its layer_types differ from llama.cpp's"),
        ("gemma2", GEMMA | {"final_logit_softcapping": None}, "it has no soft-capped logits"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "its no_rope_layers differ from llama.cpp's"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3', where llama.cpp computes default, linear, yarn"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "rope_parameters.attention_factor with yarn"),
        (
            "gemma3_text",
            GEMMA | {"num_hidden_layers": 6, "rope_parameters": {"full_attention": ROPE, "sliding_attention": LINEAR}},
            "rope_parameters of its sliding layers are not those of llama.cpp",
        ),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(
    model_type: str, settings: dict[str, Any], message: str
) -> None:
    config = CONFIG_MAPPING[model_type](**SHAPE | settings)
    with pytest.raises(ModelError, match=message):
        architecture_of(config, "model")


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("qwen3", {"attention_bias": True}, "llama.cpp adds no model.layers.0.self_attn.o_proj.bias in QWEN3 models"),
        ("smollm3", {"attention_bias": True}, "adds no model.layers.0.self_attn.o_proj.bias in SMOLLM3"),
        ("olmo2", {"attention_bias": True}, "adds no model.layers.0.self_attn.q_proj.bias in OLMO2"),
        ("gemma2", GEMMA | {"tie_word_embeddings": False}, "lm_head.weight has no place in GGUF"),
    ],
)
def test_a_tensor_that_llama_cpp_leaves_out_is_refused(model_type: str, settings: dict[str, Any], message: str) -> None:
    config = CONFIG_MAPPING[model_type](**SHAPE | settings)
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    with pytest.raises(ModelError, match=message):
        check_tensors(architecture_of(config, "model"), names, config.num_hidden_layers, "model")


def test_every_family_that_parley_trains_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(ARCHITECTURES) == set(FAMILIES)
