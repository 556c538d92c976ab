"""SmolLM3 (Hugging Face, 2025): Llama with a window by layer and some layers without rotary embeddings."""

from dataclasses import replace
from typing import Any

from parley.models.families.family import window_by_layer_type
from parley.models.families.llama import LLAMA


def _window(config: Any, layer: int) -> int | None:
    return window_by_layer_type(config, layer) if config.use_sliding_window else None


SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    members="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    window=_window,
    rope=lambda config, layer: "" if config.no_rope_layers[layer] else None,
)
