"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values; a window by layer."""

from parley.models.families.family import ModelFamily, window_by_layer_type

QWEN2 = ModelFamily(
    model_type="qwen2",
    members="Qwen 2, 2.5",
    architecture="Qwen2ForCausalLM",
    biases=frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    window=window_by_layer_type,
)
