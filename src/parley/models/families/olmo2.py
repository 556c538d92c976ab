"""OLMo 2 (arXiv 2501.00656): norms behind each branch instead of before it, and over all query or key heads at once."""

from parley.models.families.family import ModelFamily

OLMO2 = ModelFamily(
    model_type="olmo2",
    members="OLMo 2",
    architecture="Olmo2ForCausalLM",
    biases=frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
    input_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
    fp32_norm_weight=True,
    qk_norm="all_heads",
)
