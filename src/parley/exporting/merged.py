"""The merged model as a folder of transformers: safetensors in shards, configuration, tokenizer and template."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from parley.exporting.adapter import UNROUNDED
from parley.exporting.comparison import Marks
from parley.exporting.merge import HEAD
from parley.exporting.reader import Reader
from parley.exporting.readers import TransformersReader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel, save_generation_config
from parley.library_compat.tokenizers import save_tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SHARD_BYTES = 2 * 2**30
ROUNDED = Marks(flips=0.005, mean_kl=0.005, worst_kl=0.2, loss=0.01, answers=0.9)
"""Of weights rounded to 16 bits."""


class MergedExporter:
    target = "merged"
    description = "The whole model with the adapter merged into it, for transformers and every program that reads it."
    quants = tuple(DTYPES)
    default_quant = None

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        trained.check_weights()

    def size(self, trained: TrainedModel, quant: str | None) -> int:
        weights = trained.weights
        values = sum(prod(shape) for name, shape in weights.shapes().items() if name != HEAD or not weights.tied)
        return values * self._dtype(trained, quant).itemsize

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        dtype = self._dtype(trained, quant)
        _write_shards(trained, folder, dtype)
        config = trained.config
        config.dtype, config.tie_word_embeddings = dtype, trained.weights.tied
        config.save_pretrained(folder)
        save_generation_config(trained, folder)
        save_tokenizer(trained.tokenizer, folder)

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        return TransformersReader(folder, reference.dtype)

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        return UNROUNDED if self._dtype(trained, quant) == torch.float32 else ROUNDED

    def command(self, trained: TrainedModel, place: Path) -> str | None:
        return None

    def _dtype(self, trained: TrainedModel, quant: str | None) -> torch.dtype:
        """The type asked for, or the base's own 16 bits."""
        if quant is not None:
            return DTYPES[quant]
        return trained.config.dtype or torch.bfloat16


def _write_shards(trained: TrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Tensors in the model's order, in files of at most SHARD_BYTES and an index where there are several."""
    weights, places, total = trained.weights, {}, 0
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []

    def flush() -> None:
        save_file(shard, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    held = 0
    for name in weights.shapes():
        if name == HEAD and weights.tied:
            continue
        value = weights.get(name).to(dtype).contiguous()
        size = value.numel() * value.element_size()
        if shard and held + size > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = value
        held, total = held + size, total + size
    flush()
    for index, names in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    if len(files) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
