"""The adapter for vLLM: PEFT's format, where vLLM computes what PEFT does with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from transformers.utils import GENERATION_CONFIG_NAME

from parley.config import DEMO_MODEL
from parley.errors import ModelError
from parley.exporting.adapter import AdapterExporter
from parley.exporting.trained_model import TrainedModel
from parley.models.adapter_files import read_adapter_fields
from parley.models.vllm_adapters import (
    LORA_RANKS,
    adapter_arguments,
    max_lora_rank,
    tokenizer_arguments,
    unread_parts,
)


class VllmExporter(AdapterExporter):
    target = "vllm"
    description = "The adapter, checked against the rules of vLLM's LoRA loader, with the command that serves it."

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        super().check(trained, quant)
        folder = trained.adapters[-1]
        fields = read_adapter_fields(folder)
        unread = unread_parts(folder, fields)
        if unread is not None:
            raise ModelError(
                f"{trained.name}: vLLM does not read the adapter's {unread}; use --to merged, which it serves whole"
            )
        if max_lora_rank(fields.r) is None:
            raise ModelError(
                f"{trained.name}: vLLM takes adapters up to rank {LORA_RANKS[-1]}, got {fields.r}; use --to merged"
            )

    def command(self, trained: TrainedModel, place: Path) -> str:
        rank = max_lora_rank(read_adapter_fields(place).r)
        assert rank is not None
        # A folder is named as it is now; a hub id is left to vLLM, which downloads it.
        local = trained.base.name == DEMO_MODEL or Path(trained.base.name).is_dir()
        base_path = str(trained.base_folder) if local else trained.base.name
        base_name = trained.base_name if trained.base_name != trained.name else f"{trained.name}-base"
        base = trained.base.model_copy(update={"quantization": trained.settings.model.quantization})
        names = [trained.name, base_name]
        arguments = adapter_arguments(base_path, base, names, place, tokenizer_arguments(place), rank)
        if (place / GENERATION_CONFIG_NAME).is_file():
            arguments += ["--generation-config", str(place)]
        return shlex.join(["vllm", "serve", *arguments])
