"""What is exported: a finished run, its base and its tokenizer, checked before anything is written."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from parley.config import ModelSection, RunConfig
from parley.data.golden import golden_ids
from parley.errors import ModelError, RunError
from parley.exporting.merge import BaseWeights, MergedWeights, merged_weights
from parley.exporting.weights import CheckpointWeights
from parley.models.adapters import load_adapter
from parley.models.load import load_config, load_model
from parley.models.quantization import quantization_of
from parley.models.resolve import adapter_chain, model_folder
from parley.models.tokenizer import check_vocabulary, read_tokenizer
from parley.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass
class TrainedModel:
    """A run opened for export.

    Attributes:
        base: the model that the weights are read from: the run's own base, or the one given instead of it.
        adapters: folders of the adapters on it, the one nearest to the base first; empty after full fine-tuning.
        config: the base's, without a quantization.
        notes: what a user has to know of the export, a line each.
    """

    folder: RunFolder
    settings: RunConfig
    base: ModelSection
    adapters: list[Path]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    notes: list[str] = field(default_factory=list)
    base_fingerprint: str | None = None

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def base_name(self) -> str:
        """The base's hub id, or the name of its folder: never a path of this machine."""
        path = Path(self.base.name)
        return path.name if path.is_dir() else self.base.name

    @cached_property
    def base_folder(self) -> Path:
        return model_folder(self.base)

    @cached_property
    def weights(self) -> BaseWeights | MergedWeights:
        """The trained weights, tensor by tensor. Raises ModelError where they are missing or damaged."""
        return merged_weights(self.config, CheckpointWeights(self.base_folder), self.adapters)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The base's own, or one made from its config, with every token that ends an answer."""
        try:
            return GenerationConfig.from_pretrained(self.base_folder)
        except (OSError, ValueError):
            return GenerationConfig.from_model_config(self.config)

    def load(self, dtype: torch.dtype) -> Any:
        """The trained model for answers and logits: the base in `dtype` with the run's adapter attached.

        Earlier adapters are merged as in training. Raises ModelError.
        """
        name = str(dtype).removeprefix("torch.")
        section = self.base.model_copy(update={"dtype": name, "quantization": "auto"})
        model, _ = load_model(section)
        for folder in self.adapters[:-1]:
            model = load_adapter(model, folder).merge_and_unload()
        return load_adapter(model, self.adapters[-1]) if self.adapters else model


def open_run(run: str | Path, base: str | None = None, *, trust_remote_code: bool = False) -> TrainedModel:
    """Open a finished run and check that it can be exported.

    `base`: a 16-bit model to merge into, in place of a quantised one that the run was trained on.

    Raises RunError for a run that did not finish, that lacks files, or whose tokenizer is not the one it was trained
    with; ModelError for a base or adapter that is missing, damaged or does not fit.
    """
    folder = RunFolder.open(run, trust_remote_code=trust_remote_code)
    settings = folder.config
    section, adapters = _base_and_adapters(folder, settings, base)
    config = load_config(section)
    method = quantization_of(config)
    notes = []
    if method != "none":
        notes.append(f"merged into dequantised {method} weights, as only these are there; --base gives a 16-bit base")
        del config.quantization_config
    elif settings.model.quantization not in ("auto", "none"):
        notes.append(
            f"merged into the 16-bit base; training rounded it to {settings.model.quantization}, so that answers of "
            "the run differ a little"
        )
    tokenizer = read_tokenizer(folder.weights, section.model_copy(update={"chat_template": None}))
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, str(folder.weights))
    _check_golden(folder, tokenizer)
    return TrainedModel(folder, settings, section, adapters, config, tokenizer, notes)


def _base_and_adapters(folder: RunFolder, settings: RunConfig, base: str | None) -> tuple[ModelSection, list[Path]]:
    section = settings.model.model_copy(update={"quantization": "auto", "chat_template": None})
    if folder.model.is_dir():
        if base is not None:
            raise ModelError(
                f"{folder.path}: every weight was trained, so there is no base to replace; leave out --base"
            )
        return section.model_copy(update={"name": str(folder.model), "name_from_run": None}), []
    section = section.model_copy(update={"name": folder.base_name(), "name_from_run": None})
    chain, own_base = adapter_chain(section)
    # A run that continued an adapter saved all of it; one that was merged first is part of the base.
    kept = chain if section.adapter == "merge" else chain[:-1]
    adapters = [model_folder(adapter) for adapter in kept] + [folder.adapter]
    if base is None:
        return own_base, adapters
    return own_base.model_copy(update={"name": base, "revision": None}), adapters


def _check_golden(folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer or template that encodes the golden conversations otherwise than in training."""
    if not folder.golden.is_file():
        logger.warning("%s: no golden.json, so whether the tokenizer is that of training is not checked", folder.path)
        return
    try:
        golden = json.loads(folder.golden.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.golden}: cannot be read ({error}); train again, or copy it from the run") from None
    if golden != golden_ids(tokenizer):
        raise RunError(
            f"{folder.path}: its tokenizer or chat template was changed after training (golden.json has other ids); "
            "put the files of training back"
        )
