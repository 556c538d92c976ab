"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv 2404.14219, 2412.08905, 2503.01743).

Queries, keys and values are one matrix, gate and up another, which PEFT adapts as one. Phi-4-mini rotates part of a
head. Long-context models scale each frequency by one of two factors (longrope), chosen by the length of the text.
"""

from parley.models.families.family import FIXED_ROPE_TYPES, ModelFamily, window_everywhere

PHI3 = ModelFamily(
    model_type="phi3",
    members="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    architecture="Phi3ForCausalLM",
    qkv=("self_attn.qkv_proj",),
    gate_up=("mlp.gate_up_proj",),
    window=window_everywhere,
    rope_types=FIXED_ROPE_TYPES | {"longrope"},
    dropouts=("attention_dropout", "resid_pdrop"),
)
