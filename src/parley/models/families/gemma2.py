"""Gemma 2 (arXiv 2408.00118): norms around both branches, soft caps on scores and logits, a window by layer."""

from parley.models.families.family import ModelFamily, root_of_hidden_size, window_by_layer_type

GEMMA2 = ModelFamily(
    model_type="gemma2",
    members="Gemma 2",
    architecture="Gemma2ForCausalLM",
    biases=frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    fp32_norm_weight=True,
    window=window_by_layer_type,
    activation="gelu_pytorch_tanh",
    activation_field="hidden_activation",
    embedding_scale=root_of_hidden_size,
    attention_softcap=lambda config: config.attn_logit_softcapping,
    logit_softcap=lambda config: config.final_logit_softcapping,
)
