"""Granite 3 (IBM, 2024): Llama with factors on embeddings, attention scores, both branches and logits."""

from dataclasses import replace

from parley.models.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    members="Granite 3",
    architecture="GraniteForCausalLM",
    embedding_scale=lambda config: config.embedding_multiplier,
    residual_scale=lambda config: config.residual_multiplier,
    logit_scale=lambda config: 1 / config.logits_scaling,
)
