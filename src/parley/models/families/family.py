"""What the fused step and the decoder have to know of a model family, as data.

A family is a declaration of how transformers' model of that `model_type` is built: names of its modules, and the rules
by which its configuration decides what they compute. Nothing here imports torch or transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

WindowRule = Callable[[Any, int], int | None]
"""From a model's configuration and a layer's index to how many tokens a query sees; None for all before it."""

# Rotary embeddings whose frequencies do not depend on the length of the text, so that one table serves every document.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def no_window(config: Any, layer: int) -> int | None:
    return None


def window_everywhere(config: Any, layer: int) -> int | None:
    return config.sliding_window


def window_by_layer_type(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


@dataclass(frozen=True)
class ModelFamily:
    """A pre-norm decoder with rotary embeddings and a gated MLP.

    Attributes:
        model_type: transformers' name of the family (`config.model_type`).
        architecture: the class of its causal language model.
        qkv, o, gate_up, down: the linear modules of a layer. Those of one group read the same input.
        biases: the modules that may have a bias.
        qk_norm: "head" where each query and key head is normalised by `q_norm` and `k_norm`.
        window: the rule of sliding-window attention.
        rope_types: the rotary embeddings that one table of cosines and sines can express.
        activation: the MLP's, as transformers names it.
    """

    model_type: str
    architecture: str
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: tuple[str, ...] = ("self_attn.o_proj",)
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)
    biases: frozenset[str] = frozenset()
    qk_norm: Literal["head"] | None = None
    window: WindowRule = no_window
    rope_types: frozenset[str] = FIXED_ROPE_TYPES
    activation: str = "silu"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The modules of a layer, those that read the same input together, in the order of the forward pass."""
        return self.qkv, self.o, self.gate_up, self.down
