"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer, where the configuration has one."""

from parley.models.families.family import ModelFamily, window_everywhere

MISTRAL = ModelFamily(
    model_type="mistral", members="Mistral", architecture="MistralForCausalLM", window=window_everywhere
)
