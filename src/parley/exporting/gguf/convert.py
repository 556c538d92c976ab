"""A model's tensors into a GGUF file, one at a time."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from parley.exporting.gguf.architectures import SUFFIXES, Architecture, context_length, converted, head_size
from parley.exporting.gguf.quantization import QuantScheme, byte_shape, quantized
from parley.exporting.gguf.rope import add_rope
from parley.exporting.gguf.vocabulary import Vocabulary
from parley.exporting.merge import HEAD as MODEL_HEAD
from parley.exporting.merge import BaseWeights, MergedWeights

LEAST_FREE = 2**20
"""Bytes: with less a disk is full."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its name and type there, and how to get it."""

    name: str
    shape: tuple[int, ...]
    quant: GGMLQuantizationType
    read: Callable[[], Tensor]


@contextmanager
def whole_writes(path: Path) -> Iterator[None]:
    """Raises OSError with the system's own number where numpy wrote a part of an array: its error has none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        full = shutil.disk_usage(path.parent).free < LEAST_FREE
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def write_gguf(
    path: Path,
    architecture: Architecture,
    config: Any,
    weights: BaseWeights | MergedWeights,
    vocabulary: Vocabulary,
    scheme: QuantScheme,
    general: dict[str, str | int],
    threads: int,
) -> None:
    """Write a model to `path`. `general` is the metadata under general.*.

    Peak memory is the largest tensor and its conversion.
    """
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture.arch])
    try:
        for key, value in general.items():
            if isinstance(value, str):
                writer.add_string(f"general.{key}", value)
            else:
                writer.add_uint32(f"general.{key}", value)
        writer.add_file_type(scheme.file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _add_shape(writer, architecture, config)
        factors = add_rope(writer, config)
        architecture.add_metadata(writer, config)
        vocabulary.write(writer)
        tensors = [
            *(_vector(name, value) for name, value in factors.items()),
            *model_tensors(architecture, config, weights, scheme),
        ]
        for tensor in tensors:
            # A shape in bytes, as the writer expects it with numpy's type of a byte.
            shape = byte_shape(tensor.shape, tensor.quant)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=tensor.quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with whole_writes(path):
            for tensor in tensors:
                writer.write_tensor_data(quantized(tensor.read(), tensor.quant, threads))
    finally:
        writer.close()


def _add_shape(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))


def written_names(architecture: Architecture, weights: BaseWeights | MergedWeights) -> list[str]:
    """The tensors of the model that a GGUF file holds: without a tied head where it is the embedding."""
    tied = weights.tied and architecture.tied_head
    return [name for name in weights.shapes() if not (tied and name == MODEL_HEAD)]


def fallbacks(
    architecture: Architecture, config: Any, weights: BaseWeights | MergedWeights, scheme: QuantScheme
) -> Counter[tuple[str, str]]:
    """How many matrices get another type than the scheme's, by both: their rows are no multiple of its block."""
    found: Counter[tuple[str, str]] = Counter()
    layers, tied = config.num_hidden_layers, weights.tied and architecture.tied_head
    for tensor in model_tensors(architecture, config, weights, scheme):
        wanted = scheme.wanted(tensor.name, layers, tied)
        if len(tensor.shape) > 1 and tensor.quant is not wanted:
            found[wanted.name.lower(), tensor.quant.name.lower()] += 1
    return found


def model_tensors(
    architecture: Architecture, config: Any, weights: BaseWeights | MergedWeights, scheme: QuantScheme
) -> Iterator[GgufTensor]:
    """The tensors of a model under their names and in their types in GGUF. Raises ModelError as write_gguf does."""
    table, tied = architecture.names(config), weights.tied and architecture.tied_head
    for name in written_names(architecture, weights):
        shape = weights.shapes()[name]
        written = table.get_name(name, try_suffixes=SUFFIXES)
        assert written is not None, "check_tensors comes before"
        quant = scheme.type_of(written, shape, config.num_hidden_layers, tied)
        yield GgufTensor(written, shape, quant, _reader(architecture, config, weights, name))


def _reader(
    architecture: Architecture, config: Any, weights: BaseWeights | MergedWeights, name: str
) -> Callable[[], Tensor]:
    return lambda: converted(architecture, config, name, weights.get(name))


def _vector(name: str, value: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(value.shape), GGMLQuantizationType.F32, lambda: value)
