"""From a transformers model to the weights that the fused step and the decoder read. Nothing in the model is replaced.

Takes the families of parley.models.families, bare or with plain LoRA on any of their projections. `bind` is for
training, `read_weights` for inference.
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
from parley.models.families import ModelFamily, family_of
from parley.train_step.flat_parameters import FlatAdapters
from parley.train_step.fused_linear import BaseWeight, DenseWeight, FusedLinear
from parley.train_step.nf4 import Nf4Weight
from parley.train_step.ops import Adapter, AttentionShape, QkNorm, RopeTable

TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)  # tl.arange takes powers of two, tl.dot at least 16


class Unsupported(Exception):
    """Why a model takes the plain path, in a few words."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: four fused linears, two norms and the shape of its attention."""

    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    input_norm_D: Tensor
    post_attention_norm_D: Tensor
    eps: float
    shape: AttentionShape
    qk_norm: QkNorm | None


@dataclass(frozen=True)
class ModelWeights:
    """What a forward pass reads, all by reference: the transformers model stays the source of truth."""

    layers: list[LayerWeights]
    embedding_VD: Tensor
    norm_D: Tensor
    eps: float
    head_VD: Tensor
    rotary: nn.Module
    dtype: torch.dtype
    head_dim: int

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def linears(self) -> list[FusedLinear]:
        """All fused linears, in the order of the forward pass."""
        return [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    @torch.no_grad()
    def rope_table(self, positions: int) -> RopeTable:
        """Cosines and sines of the first `positions`, from the model's own rotary module."""
        position_1L = torch.arange(positions, device=self.device)[None]
        cos_1LE, sin_1LE = self.rotary(self.embedding_VD[:1], position_1L)
        half = self.head_dim // 2  # transformers repeats each frequency for both halves of a head
        return RopeTable(cos_1LE[0, :, :half].contiguous(), sin_1LE[0, :, :half].contiguous())


@dataclass(frozen=True)
class BoundModel(ModelWeights):
    """Weights bound for training: the adapters' lie in flat buffers with their gradients."""

    flat: FlatAdapters


FindAdapter = Callable[[nn.Module], Adapter | None]


def bind(model: nn.Module) -> BoundModel:
    """Read `model`'s weights for training and move its adapter weights into flat buffers.

    Which of them are trained is PEFT's `requires_grad`, as it is now.

    Raises Unsupported for whatever the fused step would compute differently from transformers and PEFT.
    """
    if not isinstance(model, PeftModel):
        raise Unsupported("the model has no PEFT adapters")
    base = model.get_base_model()
    family = _check(base)
    if base.config.attention_dropout:
        raise Unsupported("attention dropout")
    parameters = [p for layer in _projections(base, family) for group in layer for p in _lora_parameters(group)]
    if not parameters:
        raise Unsupported("the model has no LoRA adapters")
    if not any(p.requires_grad for p in parameters):
        raise Unsupported("all adapter weights are frozen (requires_grad is False)")
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    others = set(names) - {id(p) for p in parameters}
    if others:
        raise Unsupported(f"{names[others.pop()]} is trained, which is no LoRA weight of a decoder projection")
    flat = FlatAdapters(parameters)
    index = {id(p): i for i, p in enumerate(parameters)}

    def adapter(module: nn.Module) -> Adapter | None:
        if not isinstance(module, LoraLayer):
            return None
        a, b = _lora_pair(module)
        return flat.adapter(index[id(a)], index[id(b)], module.scaling[module.active_adapters[0]])

    # 64 columns keep the rows of the fused matrices aligned to 128 bytes, as tensor cores want them.
    return BoundModel(**_weights(base, family, adapter, 64 if flat.weight_Z.is_cuda else 1), flat=flat)


def read_weights(model: nn.Module) -> ModelWeights:
    """Read `model`'s weights for inference; adapters, if it has any, stay in their own memory. Raises Unsupported."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family = _check(base)

    def adapter(module: nn.Module) -> Adapter | None:
        if not isinstance(module, LoraLayer):
            return None
        a, b = (parameter.data for parameter in _lora_pair(module, trained=False))
        no_gradient = a.new_empty(0)
        return Adapter(a, b, no_gradient, no_gradient, module.scaling[module.active_adapters[0]])

    return ModelWeights(**_weights(base, family, adapter, 1))


def _weights(base: PreTrainedModel, family: ModelFamily, adapter: FindAdapter, rank_multiple: int) -> dict[str, Any]:
    """The fields of ModelWeights."""
    decoder = base.model

    def fused(modules: list[nn.Module], names: tuple[str, ...]) -> FusedLinear:
        bases = [_base_weight(module) for module in modules]
        for name, (_, bias) in zip(names, bases, strict=True):
            if bias is not None and name not in family.biases:
                raise Unsupported(f"a bias on {name}")
        bias_N = _fused_bias([bias for _, bias in bases])
        return FusedLinear([weight for weight, _ in bases], [adapter(m) for m in modules], bias_N, rank_multiple)

    layers = []
    for index, (module, groups) in enumerate(zip(decoder.layers, _projections(base, family), strict=True)):
        qkv, o, gate_up, down = map(fused, groups, family.groups)
        layers.append(
            LayerWeights(
                qkv, o, gate_up, down,
                module.input_layernorm.weight.data,
                module.post_attention_layernorm.weight.data,
                module.input_layernorm.variance_epsilon,
                _attention_shape(module.self_attn, base.config, family.window(base.config, index)),
                _qk_norm(module.self_attn, family),
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
        "head_dim": layers[0].shape.head_dim,
    }


def _check(base: nn.Module) -> ModelFamily:
    """The family of `base`, if everything outside its layers is as the family declares it."""
    if not isinstance(base, PreTrainedModel):
        raise Unsupported(f"{type(base).__name__} is no transformers model")
    config = base.config
    family = family_of(config)
    if family is None:
        raise Unsupported(f"no fused step for the {config.model_type} family")
    if type(base).__name__ != family.architecture:  # another head, or a forward pass of its own
        raise Unsupported(f"{type(base).__name__} is not {family.architecture}")
    if config.hidden_act != family.activation:
        raise Unsupported(f"activation {config.hidden_act}")
    if base.model.rotary_emb.rope_type not in family.rope_types:
        raise Unsupported(f"rotary embeddings of type {base.model.rotary_emb.rope_type}")
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # two copies, and the adapter's switch chooses between them
            raise Unsupported(f"{name} is trained beside the adapter")
    devices = {p.device for p in base.parameters()}
    if len(devices) > 1:
        raise Unsupported("the model is spread over several devices")
    head_dim = base.model.layers[0].self_attn.head_dim
    if devices.pop().type == "cuda" and head_dim not in TRITON_HEAD_DIMS:
        raise Unsupported(f"attention heads of {head_dim}")
    if not isinstance(base.lm_head, nn.Linear) or base.lm_head.bias is not None:
        raise Unsupported("the output head is no plain matrix")
    if not isinstance(base.model.embed_tokens, nn.Embedding):
        raise Unsupported("the embedding is no plain table")
    return family


def _projections(base: PreTrainedModel, family: ModelFamily) -> list[list[list[nn.Module]]]:
    """The linear modules of each group of each layer."""
    return [[[layer.get_submodule(name) for name in group] for group in family.groups] for layer in base.model.layers]


def _lora_parameters(group: list[nn.Module]) -> list[nn.Parameter]:
    """All A, then all B: neighbours in the flat buffer, so that one kernel launch serves a group."""
    pairs = [_lora_pair(module) for module in group if isinstance(module, LoraLayer)]
    return [a for a, _ in pairs] + [b for _, b in pairs]


def _lora_pair(module: LoraLayer, *, trained: bool = True) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the one active adapter; Unsupported for whatever is not plain LoRA (dropout: in training)."""
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


def _base_weight(module: nn.Module) -> tuple[BaseWeight, Tensor | None]:
    """The frozen weight of a projection, and its bias."""
    linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
    bias = None if linear.bias is None else linear.bias.data
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        if has_inference_layout(linear):
            raise Unsupported("4-bit weights in the layout of CPU inference")
        return Nf4Weight(linear.weight), bias
    if type(linear) is not nn.Linear:
        raise Unsupported(f"base layers of type {type(linear).__name__}")
    return DenseWeight(linear.weight.data), bias


def _fused_bias(biases: list[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    if any(bias is None for bias in biases):
        raise Unsupported("a bias on some projections of a group")
    return torch.cat([bias for bias in biases if bias is not None])


def _attention_shape(attention: nn.Module, config: Any, window: int | None) -> AttentionShape:
    return AttentionShape(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, attention.scaling, window
    )


def _qk_norm(attention: nn.Module, family: ModelFamily) -> QkNorm | None:
    if family.qk_norm is None:
        return None
    q, k = attention.q_norm, attention.k_norm
    return QkNorm(q.weight.data, k.weight.data, q.variance_epsilon)
