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

RopeRule = Callable[[Any, int], str | None]
"""From a configuration and a layer's index to the key of its rotary table; None for a layer without rotary embeddings.

The key is the layer type that the rotary module takes as an argument, and "" where the model has one table."""

Number = Callable[[Any], float | None]
"""From a configuration to a factor or a soft cap; None where the model has none."""

# Rotary embeddings whose frequencies do not depend on the length of the text, so that one table serves every document.
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def no_window(config: Any, layer: int) -> int | None:
    return None


def window_everywhere(config: Any, layer: int) -> int | None:
    return config.sliding_window


def window_by_layer_type(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def one_rope_table(config: Any, layer: int) -> str | None:
    return ""


def rope_by_layer_type(config: Any, layer: int) -> str | None:
    return config.layer_types[layer]


def none(config: Any) -> float | None:
    return None


def root_of_hidden_size(config: Any) -> float | None:
    return config.hidden_size**0.5


@dataclass(frozen=True)
class ModelFamily:
    """A decoder with rotary embeddings and a gated MLP.

    A layer computes, with h the residual stream and each norm optional:

        mid = h + scale * attention_out_norm(o(attention(rope(qk_norm(qkv(input_norm(h)))))))
        out = mid + scale * mlp_out_norm(down(activation(gate) * up)),  [gate up] = gate_up(mlp_norm(mid))

    Attributes:
        model_type: transformers' name of the family (`config.model_type`).
        members: its published models, as the table of families names them.
        architecture: the class of its causal language model.
        qkv, o, gate_up, down: the linear modules of a layer. Those of one group read the same input.
        biases: the modules that may have a bias.
        input_norm, attention_out_norm, mlp_norm, mlp_out_norm: the modules of these norms; None where there is none.
        norm_offset: what is added to the weight of every norm (1 where the checkpoint stores it around zero).
        fp32_norm_weight: a norm multiplies by its weight before it rounds to the activations' type, not after.
        qk_norm: what `q_norm` and `k_norm` normalise: each head, or all heads of a token together.
        window: the rule of sliding-window attention.
        rope: the rule of which rotary table a layer reads.
        rope_types: the rotary embeddings that the tables can express.
        activation: the MLP's, as transformers names it, in the configuration's field `activation_field`.
        embedding_scale, residual_scale: factors on embeddings and on what a branch adds to the residual stream.
        logit_scale: a factor on the logits.
        attention_softcap, logit_softcap: c where scores or logits z become c tanh(z / c).
        dropouts: fields of the configuration that are dropout rates; the fused step takes 0 alone.
        unsupported: fields that have to be false or None.
    """

    model_type: str
    members: str
    architecture: str
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: tuple[str, ...] = ("self_attn.o_proj",)
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)
    biases: frozenset[str] = frozenset()
    input_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    norm_offset: float = 0.0
    fp32_norm_weight: bool = False
    qk_norm: Literal["head", "all_heads"] | None = None
    window: WindowRule = no_window
    rope: RopeRule = one_rope_table
    rope_types: frozenset[str] = FIXED_ROPE_TYPES
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    activation_field: str = "hidden_act"
    embedding_scale: Number = none
    residual_scale: Number = none
    logit_scale: Number = none
    attention_softcap: Number = none
    logit_softcap: Number = none
    dropouts: tuple[str, ...] = ("attention_dropout",)
    unsupported: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The modules of a layer, those that read the same input together, in the order of the forward pass."""
        return self.qkv, self.o, self.gate_up, self.down
