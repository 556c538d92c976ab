"""From a transformers model to the weights that the fast step and the decoder read. Nothing in the model is replaced.

Knows the decoders of Llama, Mistral, Qwen2 and Qwen3, bare or with plain LoRA on any of the seven projections. `bind`
is for training, `read` for answering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from parley.library_compat.bitsandbytes import has_inference_layout
from parley.train_step.flat_parameters import FlatAdapters
from parley.train_step.fused_linear import Adapter, Base, Dense, FusedLinear
from parley.train_step.nf4 import Nf4
from parley.train_step.ops import AttentionShape, HeadNorms, Rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the text's length
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Unsupported(Exception):
    """Why a model takes the plain path, in a few words."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: four fused products, two norms and the shape of its attention."""

    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    norm_in_D: Tensor
    norm_mid_D: Tensor
    eps: float
    shape: AttentionShape
    head_norms: HeadNorms | None


@dataclass(frozen=True)
class Weights:
    """What a forward pass reads: all by reference, so that the model stays the source of truth."""

    layers: list[Layer]
    embedding_VD: Tensor
    norm_D: Tensor
    eps: float
    head_VD: Tensor
    rotary: nn.Module
    dtype: torch.dtype
    head_size: int

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def linears(self) -> list[FusedLinear]:
        return [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    @torch.no_grad()
    def rope(self, positions: int) -> Rope:
        """Cosines and sines of the first `positions`, from the model's own rotary module."""
        position_1P = torch.arange(positions, device=self.device)[None]
        cos_1PE, sin_1PE = self.rotary(self.embedding_VD[:1], position_1P)
        half = self.head_size // 2
        return Rope(cos_1PE[0, :, :half].contiguous(), sin_1PE[0, :, :half].contiguous())


@dataclass(frozen=True)
class Bound(Weights):
    """Weights whose adapters are trained: these lie in flat buffers with their gradients."""

    flat: FlatAdapters


FindAdapter = Callable[[nn.Module], Adapter | None]


def bind(model: nn.Module) -> Bound:
    """Read `model`'s weights for training and move its adapter weights into flat buffers. Raises Unsupported."""
    if not isinstance(model, PeftModel):
        raise Unsupported("the model has no PEFT adapters")
    base = _checked(model.get_base_model())
    if base.config.attention_dropout:
        raise Unsupported("attention dropout")
    parameters = [p for layer in _projections(base) for group in layer for p in _lora_weights(group)]
    if not parameters:
        raise Unsupported("the model has no LoRA adapters")
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    strangers = set(names) - {id(p) for p in parameters}
    if strangers:
        raise Unsupported(f"{names[strangers.pop()]} is trained, which is no LoRA weight of a decoder projection")
    flat = FlatAdapters(parameters)
    index = {id(p): i for i, p in enumerate(parameters)}

    def adapter(module: nn.Module) -> Adapter | None:
        if not isinstance(module, LoraLayer):
            return None
        a, b = _lora_pair(module)
        return flat.adapter(index[id(a)], index[id(b)], module.scaling[module.active_adapters[0]])

    return Bound(**_weights(base, adapter, 64 if flat.weight_G.is_cuda else 1), flat=flat)


def read(model: nn.Module) -> Weights:
    """Read `model`'s weights for answering; adapters, if it has any, stay where they are. Raises Unsupported."""
    base = _checked(model.get_base_model() if isinstance(model, PeftModel) else model)

    def adapter(module: nn.Module) -> Adapter | None:
        if not isinstance(module, LoraLayer):
            return None
        a, b = (parameter.data for parameter in _lora_pair(module, trained=False))
        no_gradient = a.new_empty(0)
        return Adapter(a, b, no_gradient, no_gradient, module.scaling[module.active_adapters[0]])

    return Weights(**_weights(base, adapter, 1))


def _weights(base: PreTrainedModel, adapter: FindAdapter, granule: int) -> dict[str, Any]:
    """The fields of Weights."""
    decoder = base.model

    def fused(modules: list[nn.Module]) -> FusedLinear:
        bases = [_base(module) for module in modules]
        return FusedLinear(
            [base for base, _ in bases], [adapter(m) for m in modules], _bias([b for _, b in bases]), granule
        )

    layers = []
    for module, groups in zip(decoder.layers, _projections(base), strict=True):
        qkv, o, gate_up, down = (fused(group) for group in groups)
        layers.append(
            Layer(
                qkv, o, gate_up, down,
                module.input_layernorm.weight.data,
                module.post_attention_layernorm.weight.data,
                module.input_layernorm.variance_epsilon,
                _attention_shape(module.self_attn, base.config),
                _head_norms(module.self_attn),
            )
        )  # fmt: skip
    return {
        "layers": layers,
        "embedding_VD": decoder.embed_tokens.weight.data,
        "norm_D": decoder.norm.weight.data,
        "eps": decoder.norm.variance_epsilon,
        "head_VD": base.lm_head.weight.data,
        "rotary": decoder.rotary_emb,
        "dtype": decoder.embed_tokens.weight.dtype,
        "head_size": layers[0].shape.size,
    }


def _checked(base: PreTrainedModel) -> PreTrainedModel:
    config = base.config
    if config.model_type not in FAMILIES:
        raise Unsupported(f"no fast step for the {config.model_type} family")
    if config.hidden_act != "silu":
        raise Unsupported(f"activation {config.hidden_act}")
    if base.model.rotary_emb.rope_type not in ROPES:
        raise Unsupported(f"rotary embeddings of type {base.model.rotary_emb.rope_type}")
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # two copies, and the adapter's switch chooses between them
            raise Unsupported(f"{name} is trained beside the adapter")
    devices = {p.device for p in base.parameters()}
    if len(devices) > 1:
        raise Unsupported("the model is spread over several devices")
    size = base.model.layers[0].self_attn.head_dim
    if devices.pop().type == "cuda" and size not in (16, 32, 64, 128, 256):
        raise Unsupported(f"attention heads of {size}")
    if not isinstance(base.lm_head, nn.Linear) or base.lm_head.bias is not None:
        raise Unsupported("the output head is no plain matrix")
    if not isinstance(base.model.embed_tokens, nn.Embedding):
        raise Unsupported("the embedding is no plain table")
    return base


def _projections(base: PreTrainedModel) -> list[list[list[nn.Module]]]:
    """The modules of each group of each layer."""
    return [[[_projection(layer, name) for name in group] for group in GROUPS] for layer in base.model.layers]


def _projection(layer: nn.Module, name: str) -> nn.Module:
    parent = layer.self_attn if name in (*GROUPS[0], *GROUPS[1]) else layer.mlp
    return parent.get_submodule(name)


def _lora_weights(group: list[nn.Module]) -> list[nn.Parameter]:
    """All A, then all B, so that the A of a group are neighbours in the flat buffer, and so are the B."""
    pairs = [_lora_pair(module) for module in group if isinstance(module, LoraLayer)]
    return [a for a, _ in pairs] + [b for _, b in pairs]


def _lora_pair(module: LoraLayer, *, trained: bool = True) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the one active adapter; Unsupported for whatever plain LoRA does not do. Dropout is for training."""
    if not isinstance(module, LoraLinear) and type(module).__name__ != "Linear4bit":
        raise Unsupported(f"adapters of type {type(module).__name__}")
    if len(module.lora_A) != 1 or len(module.active_adapters) != 1:
        raise Unsupported("several adapters")
    name = module.active_adapters[0]
    if module.merged or module.disable_adapters:
        raise Unsupported("the adapter is merged or switched off")
    if name in module.lora_variant:
        raise Unsupported(f"{type(module.lora_variant[name]).__name__} adapters")
    if module.lora_bias[name]:
        raise Unsupported("LoRA bias")
    if trained and not isinstance(module.lora_dropout[name], nn.Identity):
        raise Unsupported("LoRA dropout")
    return module.lora_A[name].weight, module.lora_B[name].weight


def _base(module: nn.Module) -> tuple[Base, Tensor | None]:
    """The frozen weight of a projection, and its bias."""
    linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
    bias = None if linear.bias is None else linear.bias.data
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        if has_inference_layout(linear):
            raise Unsupported("4-bit weights in the layout of CPU inference")
        return Nf4(linear.weight), bias
    if type(linear) is not nn.Linear:
        raise Unsupported(f"base layers of type {type(linear).__name__}")
    return Dense(linear.weight.data), bias


def _bias(biases: list[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    if any(bias is None for bias in biases):
        raise Unsupported("a bias on some projections of a group")
    return torch.cat([bias for bias in biases if bias is not None])


def _attention_shape(attention: nn.Module, config: Any) -> AttentionShape:
    window = attention.sliding_window if config.model_type in ("qwen2", "qwen3") else None
    if config.model_type == "mistral":
        window = config.sliding_window
    return AttentionShape(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling, window
    )


def _head_norms(attention: nn.Module) -> HeadNorms | None:
    norms = dict(attention.named_children())
    if "q_norm" not in norms:
        return None
    q, k = norms["q_norm"], norms["k_norm"]
    return HeadNorms(q.weight.data, k.weight.data, q.variance_epsilon)
