"""From a transformers model to the weights that the fused step and the decoder read. Nothing in the model is replaced.

Takes the families of parley.models.families, bare or with LoRA on any of their projections; in training also with DoRA
or LoRA dropout. `bind` is for training, `read_weights` for inference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from parley.library_compat.bitsandbytes import has_inference_layout
from parley.models.families import ModelFamily, family_of
from parley.train_step.flat_parameters import FlatAdapters
from parley.train_step.fused_linear import BaseWeight, DenseWeight, FusedLinear
from parley.train_step.nf4 import Nf4Weight
from parley.train_step.ops import Adapter, AttentionShape, LogitTransform, QkNorm, RmsNorm, RopeTable

# tl.dot takes at least 16 columns; more than these do not fit into shared memory.
MIN_TRITON_HEAD, MAX_TRITON_HEAD = 16, {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
MAX_GROUP = 4  # at least as many as the projections of a fused matrix


class Unsupported(Exception):
    """Why a model takes the plain path, in a few words."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: four fused linears, its norms and the shape of its attention. Named as in ModelFamily."""

    qkv: FusedLinear
    o: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    input_norm: RmsNorm | None
    attention_out_norm: RmsNorm | None
    mlp_norm: RmsNorm | None
    mlp_out_norm: RmsNorm | None
    shape: AttentionShape
    qk_norm: QkNorm | None
    rope: str | None  # the key of its rotary table
    activation: str
    residual_scale: float | None

    @property
    def transforms_branches(self) -> bool:
        """Whether anything lies between a branch's last product and the residual stream."""
        return bool(self.attention_out_norm or self.mlp_out_norm or self.residual_scale is not None)

    @property
    def keeps_attention_branch(self) -> bool:
        """Whether the gradient needs the result of o's product: for a norm, or DoRA's magnitudes."""
        return self.attention_out_norm is not None or self.o.dora is not None

    @property
    def keeps_mlp_branch(self) -> bool:
        """The same of down."""
        return self.mlp_out_norm is not None or self.down.dora is not None


@dataclass(frozen=True)
class ModelWeights:
    """What a forward pass reads, all by reference: the transformers model stays the source of truth."""

    layers: list[LayerWeights]
    embedding_VD: Tensor
    embedding_scale: float | None
    norm: RmsNorm
    head_VD: Tensor
    logits: LogitTransform
    rotary: nn.Module
    rope_switch: int | None  # longrope: longer documents take the second row of each position
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def linears(self) -> list[FusedLinear]:
        """All fused linears, in the order of the forward pass."""
        return [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    @property
    def hidden_size(self) -> int:
        return self.embedding_VD.shape[1]

    @torch.no_grad()
    def rope_tables(self, positions: int) -> dict[str, RopeTable]:
        """Cosines and sines of a text of `positions` tokens, by LayerWeights.rope, from the model's own module."""
        return {key: self._rope_table(key, positions) for key in self._rope_keys()}

    @torch.no_grad()
    def two_row_rope_tables(self, positions: int) -> dict[str, RopeTable]:
        """With two rows a position: that of texts of up to `rope_switch` tokens, and that of longer ones."""
        assert self.rope_switch is not None
        # The module chooses the frequencies by the last position that it is given.
        short, long = min(positions, self.rope_switch), max(positions, self.rope_switch + 1)
        return {
            key: _interleaved(self._rope_table(key, short), self._rope_table(key, long)) for key in self._rope_keys()
        }

    def _rope_keys(self) -> set[str]:
        return {layer.rope for layer in self.layers if layer.rope is not None}

    def _rope_table(self, key: str, positions: int) -> RopeTable:
        position_1L = torch.arange(positions, device=self.device)[None]
        layer_type = (key,) if key else ()
        cos_1LE, sin_1LE = self.rotary(self.embedding_VD[:1], position_1L, *layer_type)
        half = cos_1LE.shape[2] // 2  # transformers repeats each frequency for both halves
        return RopeTable(cos_1LE[0, :, :half].contiguous(), sin_1LE[0, :, :half].contiguous())


@dataclass(frozen=True)
class BoundModel(ModelWeights):
    """Weights bound for training: the adapters' lie in flat buffers with their gradients."""

    flat: FlatAdapters

    @property
    def has_dropout(self) -> bool:
        return any(linear.has_dropout for linear in self.linears)


FindAdapter = Callable[[nn.Module], Adapter | None]


def bind(model: nn.Module, device_type: str | None = None) -> BoundModel:
    """Read `model`'s weights for training and move its adapter weights into flat buffers.

    Which of them are trained is PEFT's `requires_grad`, as it is now. `device_type` is where the model will be, for
    one on the meta device; without a value, where it is.

    Raises Unsupported for whatever the fused step would compute differently from transformers and PEFT.
    """
    if not isinstance(model, PeftModel):
        raise Unsupported("the model has no PEFT adapters")
    base = model.get_base_model()
    device_type = device_type or next(base.parameters()).device.type
    family = _check(base, device_type)
    for field in family.dropouts:
        if getattr(base.config, field):
            raise Unsupported(f"{field} {getattr(base.config, field)}")
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
        a, b, *magnitude = (index[id(parameter)] for parameter in _lora_weights(module))
        scale = module.scaling[module.active_adapters[0]]
        return flat.adapter(a, b, scale, magnitude[0] if magnitude else None, _dropout(module))

    # 64 columns keep the rows of the fused matrices aligned to 128 bytes, as tensor cores want them.
    return BoundModel(**_weights(base, family, adapter, 64 if device_type == "cuda" else 1), flat=flat)


def read_weights(model: nn.Module) -> ModelWeights:
    """Read `model`'s weights for inference; adapters, if it has any, stay in their own memory. Raises Unsupported."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    family = _check(base, next(base.parameters()).device.type)

    def adapter(module: nn.Module) -> Adapter | None:
        if not isinstance(module, LoraLayer):
            return None
        a, b, *magnitude = (parameter.data for parameter in _lora_weights(module))
        if magnitude:
            raise Unsupported("DoRA adapters")
        no_gradient = a.new_empty(0)
        return Adapter(a, b, no_gradient, no_gradient, module.scaling[module.active_adapters[0]])

    return ModelWeights(**_weights(base, family, adapter, 1))


def _weights(base: PreTrainedModel, family: ModelFamily, adapter: FindAdapter, rank_multiple: int) -> dict[str, Any]:
    """The fields of ModelWeights."""
    decoder = base.model
    streams = itertools.count()

    def fused(modules: list[nn.Module], names: tuple[str, ...]) -> FusedLinear:
        bases = [_base_weight(module) for module in modules]
        for name, (_, bias) in zip(names, bases, strict=True):
            if bias is not None and name not in family.biases:
                raise Unsupported(f"a bias on {name}")
        bias_N = _fused_bias([bias for _, bias in bases])
        stream = MAX_GROUP * next(streams)
        adapters = [adapter(module) for module in modules]
        return FusedLinear([weight for weight, _ in bases], adapters, bias_N, rank_multiple, stream)

    def norm(parent: nn.Module, name: str | None) -> RmsNorm | None:
        if name is None:
            return None
        return RmsNorm(_norm_weight(parent.get_submodule(name), family), base.config.rms_norm_eps)

    layers = []
    for index, (module, groups) in enumerate(zip(decoder.layers, _projections(base, family), strict=True)):
        qkv, o, gate_up, down = map(fused, groups, family.groups)
        layers.append(
            LayerWeights(
                qkv, o, gate_up, down,
                norm(module, family.input_norm),
                norm(module, family.attention_out_norm),
                norm(module, family.mlp_norm),
                norm(module, family.mlp_out_norm),
                _attention_shape(module.self_attn, base.config, family, index),
                _qk_norm(module.self_attn, base.config, family),
                family.rope(base.config, index),
                family.activation,
                family.residual_scale(base.config),
            )
        )  # fmt: skip
    embedding_VD = decoder.embed_tokens.weight.data
    return {
        "layers": layers,
        "embedding_VD": embedding_VD,
        "embedding_scale": _embedding_scale(base.config, family, embedding_VD.dtype),
        "norm": norm(decoder, "norm"),
        "head_VD": base.lm_head.weight.data,
        "logits": LogitTransform(family.logit_scale(base.config) or 1.0, family.logit_softcap(base.config)),
        "rotary": decoder.rotary_emb,
        "rope_switch": longrope_switch(base.config),
        "dtype": embedding_VD.dtype,
    }


def _check(base: nn.Module, device_type: str) -> ModelFamily:
    """The family of `base`, if everything outside its layers is as the family declares it."""
    if not isinstance(base, PreTrainedModel):
        raise Unsupported(f"{type(base).__name__} is no transformers model")
    family = supported_family(base.config)
    if type(base).__name__ != family.architecture:  # another head, or a forward pass of its own
        raise Unsupported(f"{type(base).__name__} is not {family.architecture}")
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # two copies, and the adapter's switch chooses between them
            raise Unsupported(f"{name} is trained beside the adapter")
    if len({p.device for p in base.parameters()}) > 1:
        raise Unsupported("the model is spread over several devices")
    head_dim, dtype = base.model.layers[0].self_attn.head_dim, base.model.embed_tokens.weight.dtype
    if device_type == "cuda" and not MIN_TRITON_HEAD <= head_dim <= MAX_TRITON_HEAD[dtype]:
        raise Unsupported(f"attention heads of {head_dim} in {dtype}")
    if not isinstance(base.lm_head, nn.Linear) or base.lm_head.bias is not None:
        raise Unsupported("the output head is no plain matrix")
    if not isinstance(base.model.embed_tokens, nn.Embedding):
        raise Unsupported("the embedding is no plain table")
    return family


def supported_family(config: Any) -> ModelFamily:
    """The family of a configuration that the fused step computes as transformers does. Raises Unsupported."""
    family = family_of(config)
    if family is None:
        raise Unsupported(f"no fused step for the {config.model_type} family")
    activation = getattr(config, family.activation_field)
    if activation != family.activation:
        raise Unsupported(f"activation {activation}")
    for rope_type in _rope_types(config):
        if rope_type not in family.rope_types:
            raise Unsupported(f"rotary embeddings of type {rope_type}")
    for field in family.unsupported:
        if getattr(config, field):
            raise Unsupported(field)
    return family


def _projections(base: PreTrainedModel, family: ModelFamily) -> list[list[list[nn.Module]]]:
    """The linear modules of each group of each layer."""
    return [[[layer.get_submodule(name) for name in group] for group in family.groups] for layer in base.model.layers]


def _lora_parameters(group: list[nn.Module]) -> list[nn.Parameter]:
    """All A, then all B, then all magnitudes: neighbours in the flat buffer, so that one launch serves a group."""
    weights = [_lora_weights(module) for module in group if isinstance(module, LoraLayer)]
    return [weight for part in itertools.zip_longest(*weights) for weight in part if weight is not None]


def _lora_weights(module: LoraLayer) -> list[nn.Parameter]:
    """A and B of the one active adapter, and DoRA's magnitude; Unsupported for whatever else there is."""
    if not isinstance(module, LoraLinear) and type(module).__name__ != "Linear4bit":
        raise Unsupported(f"adapters of type {type(module).__name__}")
    if len(module.lora_A) != 1 or len(module.active_adapters) != 1:
        raise Unsupported("several adapters")
    name = module.active_adapters[0]
    if module.merged or module.disable_adapters:
        raise Unsupported("the adapter is merged or switched off")
    if name in module.lora_variant and not isinstance(module.lora_variant[name], DoraLinearVariant):
        raise Unsupported(f"{type(module.lora_variant[name]).__name__} adapters")
    if module.lora_bias[name]:
        raise Unsupported("LoRA bias")
    weights, magnitude = [module.lora_A[name].weight, module.lora_B[name].weight], _dora(module)
    return weights if magnitude is None else [*weights, magnitude]


def _dora(module: LoraLayer) -> nn.Parameter | None:
    """The magnitude of DoRA; None for plain LoRA."""
    name = module.active_adapters[0]
    return module.lora_magnitude_vector[name].weight if name in module.lora_variant else None


def _dropout(module: LoraLayer) -> float:
    """The probability of LoRA dropout in training."""
    dropout = module.lora_dropout[module.active_adapters[0]]
    p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    if p and _dora(module) is not None:  # with the input as it is and with the dropped one
        raise Unsupported("DoRA with LoRA dropout, which multiplies each weight twice")
    if not 0 <= p < 1:
        raise Unsupported(f"LoRA dropout of {p}")
    return float(p)


def has_lora_dropout(model: nn.Module) -> bool:
    """Whether an active adapter of `model` has dropout in training."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    names = [(layer, name) for layer in layers for name in layer.active_adapters if name in layer.lora_dropout]
    dropouts = [layer.lora_dropout[name] for layer, name in names]
    return any(isinstance(dropout, nn.Dropout) and dropout.p > 0 for dropout in dropouts)


def _base_weight(module: nn.Module) -> tuple[BaseWeight, Tensor | None]:
    """The frozen weight of a projection, and its bias."""
    linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
    bias = None if linear.bias is None else linear.bias.data
    if isinstance(linear, bitsandbytes.nn.Linear4bit):
        if has_inference_layout(linear):
            raise Unsupported("4-bit weights in the layout of CPU inference")
        if linear.in_features % 2:  # the kernels read whole bytes of a row, two values each
            raise Unsupported(f"4-bit weights with {linear.in_features} input features, an odd number")
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


def _attention_shape(attention: nn.Module, config: Any, family: ModelFamily, index: int) -> AttentionShape:
    return AttentionShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        family.window(config, index),
        family.attention_softcap(config),
    )


def _norm_weight(norm: nn.Module, family: ModelFamily) -> Tensor:
    """In fp32 where the family multiplies before it rounds; see RmsNorm."""
    if family.norm_offset:
        return norm.weight.data.float() + family.norm_offset
    return norm.weight.data.float() if family.fp32_norm_weight else norm.weight.data


def _qk_norm(attention: nn.Module, config: Any, family: ModelFamily) -> QkNorm | None:
    if family.qk_norm is None:
        return None
    return QkNorm(_norm_weight(attention.q_norm, family), _norm_weight(attention.k_norm, family), config.rms_norm_eps)


def _embedding_scale(config: Any, family: ModelFamily, dtype: torch.dtype) -> float | None:
    """Rounded to the embedding's type first, as transformers does."""
    scale = family.embedding_scale(config)
    return None if scale is None else torch.tensor(scale).to(dtype).item()


def _rope_types(config: Any) -> list[str]:
    """Of the one rotary embedding, or of each layer type's."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [parameters[layer_type]["rope_type"] for layer_type in sorted(set(config.layer_types))]


def longrope_switch(config: Any) -> int | None:
    """The most tokens for which longrope takes its short factors; None for other rotary embeddings."""
    parameters = config.get_text_config().to_dict().get("rope_parameters") or {}
    return parameters["original_max_position_embeddings"] if parameters.get("rope_type") == "longrope" else None


def _interleaved(short: RopeTable, long: RopeTable) -> RopeTable:
    """Row 2 p of `short` and 2 p + 1 of `long` for position p, as many as `long` has."""

    def rows(short_LE: Tensor, long_LE: Tensor) -> Tensor:
        # No document reaches the positions that are missing in the short table: it would be a long one.
        padded_LE = torch.cat([short_LE, long_LE[len(short_LE) :]])
        return torch.stack([padded_LE, long_LE], dim=1).flatten(0, 1)

    return RopeTable(rows(short.cos_LE, long.cos_LE), rows(short.sin_LE, long.sin_LE))
