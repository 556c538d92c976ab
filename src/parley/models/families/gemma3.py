"""Gemma 3, text alone (arXiv 2503.19786): Gemma 2 without its caps on scores, with norms on query and key heads, and
rotary embeddings of their own for the layers with a window."""

from dataclasses import replace

from parley.models.families.family import none, rope_by_layer_type
from parley.models.families.gemma2 import GEMMA2

GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    members="Gemma 3 (text)",
    architecture="Gemma3ForCausalLM",
    qk_norm="head",
    rope=rope_by_layer_type,
    attention_softcap=none,  # transformers reads the field and does not apply it
    unsupported=("use_bidirectional_attention",),
)
