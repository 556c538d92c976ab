"""Checks of a model folder's config.json and generation_config.json, before transformers builds anything from them.

transformers takes many fields as they are and fails later, in the middle of a model's constructor or at its first
answer. The names below are those that decoder families share; each is checked where it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from parley.errors import ModelError
from parley.models.json_files import read_json_object, validated
from parley.text import one_line

MOST_LAYERS = 10_000
ROPE_TYPES = {"default", "mrope", "su", *ROPE_INIT_FUNCTIONS}  # su: the older name of longrope; mrope: Qwen's

Size = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Sizes = Size | list[Size] | None
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
TokenIds = StrictInt | list[StrictInt] | None


class GenerationFields(BaseModel):
    """Fields of generation_config.json that decide where an answer ends; the others are overridden or unused."""

    model_config = ConfigDict(extra="ignore")

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: StrictInt | None = None
    watermarking_config: dict[str, Any] | None = None


class ConfigFields(BaseModel):
    """Fields of config.json that decoder families share."""

    model_config = ConfigDict(extra="ignore")

    architectures: list[StrictStr] | None = None
    model_type: StrictStr | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Sizes = None
    num_hidden_layers: Annotated[StrictInt, Field(ge=1, le=MOST_LAYERS)] | None = None
    num_attention_heads: Sizes = None
    num_key_value_heads: Sizes = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: Positive | None = None
    layer_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    initializer_range: Annotated[Number, Field(ge=0)] | None = None
    attention_dropout: Share | None = None
    attention_bias: StrictBool | None = None
    mlp_bias: StrictBool | None = None
    tie_word_embeddings: StrictBool | None = None
    use_cache: StrictBool | None = None
    sliding_window: StrictInt | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: StrictInt | None = None
    quantization_config: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    id2label: dict[str, Any] | None = None


def check_config(folder: Path) -> None:
    """Raises ModelError for a config.json or generation_config.json in `folder` that cannot be a decoder's."""
    path = folder / "config.json"
    values = read_json_object(path)
    for part in [values, *(values[key] for key in ("text_config", "llm_config") if key in values)]:
        if not isinstance(part, dict):
            raise ModelError(f"{path}: text_config is {one_line(repr(part), 60)}, wanted an object of settings")
        # Models of text and images keep the decoder's fields in text_config; others have them at the top.
        fields = validated(ConfigFields, part, path)
        for fault in (*_names(part), *_sizes(fields), *_rope(fields)):
            raise ModelError(f"{path}: {fault}; correct it, or download it again")
    generation = folder / "generation_config.json"
    if generation.is_file():
        validated(GenerationFields, read_json_object(generation), generation)


def check_index(folder: Path) -> None:
    """Raises ModelError where the index of a sharded checkpoint is broken or names files outside of `folder`."""
    for path in folder.glob("*.index.json"):
        shards = read_json_object(path).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelError(f"{path}: weight_map is no object of file names; download it again")
        for shard in set(shards.values()):
            # An index from elsewhere must not make torch.load or safetensors open files outside of the folder.
            if Path(shard).name != shard:
                raise ModelError(f"{path}: {one_line(shard, 80)} is not a file of this folder, and is not followed")


def _names(values: dict[str, Any]) -> Iterator[str]:
    """Names of activations and types that neither transformers nor torch has."""
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        name = values.get(key)
        if name is not None and (not isinstance(name, str) or name not in ACT2FN):
            yield f"{key} is {one_line(repr(name), 60)}, which transformers does not have"
    for key in ("dtype", "torch_dtype"):
        name = values.get(key)
        if name is None or name == "auto" or isinstance(name, dict):  # of several parts, each may have its own
            continue
        dtype = vars(torch).get(name.removeprefix("torch.")) if isinstance(name, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            yield f"{key} is {one_line(repr(name), 60)}, wanted a floating-point type such as bfloat16"


def _sizes(fields: ConfigFields) -> Iterator[str]:
    heads, groups = fields.num_attention_heads, fields.num_key_value_heads
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        yield f"{heads} attention heads cannot share {groups} key-value heads evenly"


def _rope(fields: ConfigFields) -> Iterator[str]:
    """Rotary embeddings: one object, or one for each type of layers."""
    for field in ("rope_parameters", "rope_scaling"):
        given = vars(fields)[field] or {}
        # Gemma 3 and others have one set of parameters for each type of attention layer.
        parts = list(given.values()) if given and all(isinstance(part, dict) for part in given.values()) else [given]
        for part in parts:
            kind = part.get("rope_type", part.get("type", "default"))
            if not isinstance(kind, str) or kind not in ROPE_TYPES:
                yield f"{field}: rope_type {one_line(repr(kind), 60)} is none of {', '.join(sorted(ROPE_TYPES))}"
            for key in ("factor", "rope_theta", "original_max_position_embeddings"):
                value = part.get(key)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if value is not None and not (number and 0 < value < float("inf")):
                    yield f"{field}: {key} is {one_line(repr(value), 60)}, wanted a number over 0"
