"""Rotary embeddings in GGUF: metadata, and the tensors of factors that some scalings need."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from parley.exporting.gguf.architectures import head_size, rope_parameters

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def rotary_size(config: Any) -> int:
    """Dimensions of a head that are rotated."""
    return int(head_size(config) * (rope_parameters(config).get("partial_rotary_factor") or 1.0))


def add_rope(writer: GGUFWriter, config: Any) -> dict[str, Tensor]:
    """Write the metadata of `config`'s rotary embedding; returns its tensors of factors, each (E / 2,) float32.

    `architecture_of` refuses scalings that llama.cpp does not compute.
    """
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(rotary_size(config))
    if kind == "default":
        return {}
    if kind == "llama3":
        return {FREQUENCY_FACTORS: llama3_factors(parameters, rotary_size(config))}
    if kind == "longrope":
        return _add_longrope(writer, config, parameters)
    assert kind in ("linear", "yarn"), "the architecture's declaration says which it computes"
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        _add_yarn(writer, config, parameters)
    return {}


def llama3_factors(parameters: dict[str, Any], size: int) -> Tensor:
    """Divisors of the frequencies of Llama 3.1's scaling, (size / 2,) float32.

    Frequencies of short wavelengths stay, long ones are divided by `factor`, and those between are interpolated
    (arXiv:2407.21783; transformers' `_compute_llama3_parameters`).
    """
    frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    wavelengths = 2 * math.pi / frequencies
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # 1: the frequency stays
    return 1.0 / ((1 - kept) / factor + kept)


def _add_longrope(writer: GGUFWriter, config: Any, parameters: dict[str, Any]) -> dict[str, Tensor]:
    original = config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    writer.add_rope_scaling_attn_factors(attention)
    return {
        LONG_FACTORS: torch.tensor(parameters["long_factor"], dtype=torch.float32),
        SHORT_FACTORS: torch.tensor(parameters["short_factor"], dtype=torch.float32),
    }


def _add_yarn(writer: GGUFWriter, config: Any, parameters: dict[str, Any]) -> None:
    writer.add_rope_scaling_orig_ctx_len(
        parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    )
    for name, add in (
        ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
    ):
        if parameters.get(name) is not None:
            add(parameters[name])
