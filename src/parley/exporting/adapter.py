"""The adapter as PEFT reads it, with the tokenizer and template it was trained with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from parley.errors import ModelError
from parley.exporting.comparison import Marks
from parley.exporting.reader import Reader
from parley.exporting.readers import TransformersReader
from parley.exporting.reference import Reference
from parley.exporting.trained_model import TrainedModel, save_generation_config
from parley.library_compat.tokenizers import save_tokenizer
from parley.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter_fields, read_adapter_weights

UNROUNDED = Marks(flips=0, mean_kl=1e-6, worst_kl=1e-4, loss=1e-4, answers=0.95, logit=1e-3)
"""Between two programs that compute the same weights in float32."""


class AdapterReader(TransformersReader):
    """An adapter's folder that PEFT puts on its base."""

    def __init__(self, folder: Path, base: str, dtype: torch.dtype) -> None:
        self._base = base
        super().__init__(folder, dtype)

    @property
    def program(self) -> str:
        return f"PEFT {peft.__version__}"

    def _load(self, folder: Path, dtype: torch.dtype) -> Any:
        base = AutoModelForCausalLM.from_pretrained(self._base, dtype=dtype, local_files_only=True)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            base.generation_config = GenerationConfig.from_pretrained(folder)
        return PeftModel.from_pretrained(base, folder).eval()

    def ends_answers(self, token: int) -> bool:
        # Programs end at the base's tokens and the tokenizer's, unless they are given the generation config beside it.
        return token == self.tokenizer.eos_token_id or super().ends_answers(token)


class AdapterExporter:
    target = "adapter"
    description = "The adapter in PEFT's format, with tokenizer and chat template."
    quants: tuple[str, ...] = ()
    default_quant = None

    def check(self, trained: TrainedModel, quant: str | None) -> None:
        if not trained.adapters:
            raise ModelError(f"{trained.name}: every weight was trained, so there is no adapter; use --to merged")
        if len(trained.adapters) > 1:
            raise ModelError(
                f"{trained.name}: its base is an adapter merged in memory, which the adapter alone would lack; "
                "use --to merged"
            )

        folder = trained.adapters[-1]
        read_adapter_weights(folder, read_adapter_fields(folder))  # damaged weights are refused here

    def size(self, trained: TrainedModel, quant: str | None) -> int:
        return (trained.adapters[-1] / WEIGHTS_FILE).stat().st_size

    def write(self, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        # A checkpoint's folder holds an optimizer's state and more beside these.
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(trained.adapters[-1] / name, folder / name)
        save_tokenizer(trained.tokenizer, folder)
        if trained.undeclared_ends:
            save_generation_config(trained, folder)
            ends = ", ".join(trained.tokenizer.convert_ids_to_tokens(trained.undeclared_ends))
            trained.notes.append(
                f"adapter: the base does not end answers at the end of turn {ends}, as training does; give programs "
                f"{GENERATION_CONFIG_NAME}, beside the adapter"
            )

    def open(self, trained: TrainedModel, folder: Path, reference: Reference) -> Reader:
        return AdapterReader(folder, str(trained.base_folder), reference.dtype)

    def marks(self, trained: TrainedModel, quant: str | None) -> Marks:
        return UNROUNDED

    def command(self, trained: TrainedModel, place: Path) -> str | None:
        return None
