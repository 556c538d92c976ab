"""Qwen3 (arXiv 2505.09388): norms on query and key heads, biases of attention by configuration, a window by layer."""

from parley.models.families.family import ModelFamily, window_by_layer_type

QWEN3 = ModelFamily(
    model_type="qwen3",
    members="Qwen 3",
    architecture="Qwen3ForCausalLM",
    biases=frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
    qk_norm="head",
    window=window_by_layer_type,
)
