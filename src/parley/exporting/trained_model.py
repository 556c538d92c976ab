"""What is exported: a finished run, its base and its tokenizer, checked before anything is written."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from parley.config import ModelSection, RunConfig
from parley.data.golden import golden_ids
from parley.errors import ModelError, RunError
from parley.exporting.merge import BaseWeights, MergedWeights, merged_weights
from parley.exporting.weights import CheckpointWeights
from parley.inference.prompts import end_of_answer_ids
from parley.models.adapter_files import CONFIG_FILE, read_adapter_fields
from parley.models.adapters import load_adapter
from parley.models.fingerprint import weights_fingerprint
from parley.models.load import load_config, load_model
from parley.models.quantization import quantization_of
from parley.models.resolve import adapter_chain, model_folder
from parley.models.tokenizer import fit_vocabulary, read_tokenizer
from parley.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

MOST_ROUNDING = 0.25
"""Of a matrix quantised to 4 bits, relative to its norm: NF4 rounds by about 0.1, and another model differs by 1."""


@dataclass
class TrainedModel:
    """A run opened for export.

    Attributes:
        base: the model that the weights are read from: the run's own base, or the one given instead of it.
        adapters: folders of the adapters on it, the one nearest to the base first; empty after full fine-tuning.
        config: the base's, without a quantization.
        base_fingerprint: of the base's weight files.
        notes: what a user has to know of the export, a line each.
    """

    folder: RunFolder
    settings: RunConfig
    base: ModelSection
    adapters: list[Path]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    base_fingerprint: str
    notes: list[str] = field(default_factory=list)

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

    def check_weights(self) -> None:
        """Raises ModelError where weights of the base or an adapter are missing, damaged or do not fit."""
        assert self.weights.shapes()

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The base's own, or one made from its config, with every token that ends an answer in training."""
        config = copy.deepcopy(self._base_generation_config)
        ends = end_of_answer_ids(config.eos_token_id, self.tokenizer)
        if set(ends) - set(self._declared_ends):
            config.eos_token_id = ends
        return config

    @property
    def undeclared_ends(self) -> list[int]:
        """Tokens that end answers in training, which neither the base's generation config nor the tokenizer names."""
        ends = end_of_answer_ids(self._declared_ends, self.tokenizer)
        return [end for end in ends if end not in (*self._declared_ends, self.tokenizer.eos_token_id)]

    @property
    def _declared_ends(self) -> list[int]:
        declared = self._base_generation_config.eos_token_id
        return declared if isinstance(declared, list) else [] if declared is None else [declared]

    @cached_property
    def _base_generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self.base_folder)
        except (OSError, ValueError):
            return GenerationConfig.from_model_config(self.config)

    def load(self, dtype: torch.dtype) -> Any:
        """The trained model for answers and logits: the base in `dtype` with the run's adapter attached, on the CPU.

        Every reader computes there, and a GPU would round otherwise. Earlier adapters are merged as in training.

        Raises ModelError.
        """
        name = str(dtype).removeprefix("torch.")
        section = self.base.model_copy(update={"dtype": name, "quantization": "auto", "device": "cpu"})
        model, _ = load_model(section)
        for folder in self.adapters[:-1]:
            model = load_adapter(model, folder).merge_and_unload()
        return load_adapter(model, self.adapters[-1]) if self.adapters else model


def save_generation_config(trained: TrainedModel, folder: Path) -> None:
    """Write generation_config.json, whatever the base says of sampling: `save_pretrained` refuses what contradicts."""
    trained.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


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
    if folder.stopped_at is not None:
        notes.append(f"the run did not finish: the weights are those of its last checkpoint, {folder.stopped_at.name}")
    if method != "none":
        notes.append(f"merged into dequantised {method} weights, as only these are there; --base gives a 16-bit base")
        del config.quantization_config
    elif settings.model.quantization not in ("auto", "none"):
        notes.append(
            f"merged into the 16-bit base; training rounded it to {settings.model.quantization}, so that answers of "
            "the run differ a little"
        )
    if adapters:
        _check_base(folder, settings, section, config, replaced=base is not None)
    saved = section.model_copy(update={"name": str(folder.weights), "chat_template": None})
    tokenizer = fit_vocabulary(read_tokenizer(folder.weights, saved), config.get_text_config().vocab_size, saved)
    _check_golden(folder, tokenizer)
    fingerprint = weights_fingerprint(model_folder(section))
    return TrainedModel(folder, settings, section, adapters, config, tokenizer, fingerprint, notes)


def _base_and_adapters(folder: RunFolder, settings: RunConfig, base: str | None) -> tuple[ModelSection, list[Path]]:
    section = settings.model.model_copy(update={"quantization": "auto", "chat_template": None})
    if not (folder.weights / CONFIG_FILE).is_file():  # a whole model
        if base is not None:
            raise ModelError(
                f"{folder.path}: every weight was trained, so there is no base to replace; leave out --base"
            )
        return section.model_copy(update={"name": str(folder.weights), "name_from_run": None}), []
    section = section.model_copy(update={"name": folder.base_name(), "name_from_run": None})
    chain, own_base = adapter_chain(section)
    if own_base.revision is None:  # of a hub id, the commit that was trained on
        own_base = own_base.model_copy(update={"revision": read_adapter_fields(folder.weights).revision})
    # A run that continued an adapter saved all of it; one that was merged first is part of the base.
    kept = chain if section.adapter == "merge" else chain[:-1]
    adapters = [model_folder(adapter) for adapter in kept] + [folder.weights]
    if base is None:
        return own_base, adapters
    return own_base.model_copy(update={"name": base, "revision": None}), adapters


def _check_base(
    folder: RunFolder, settings: RunConfig, section: ModelSection, config: PreTrainedConfig, *, replaced: bool
) -> None:
    """Refuse a base that is not the run's, or a 16-bit replacement that is not what the run's was quantised from."""
    recorded = _recorded_fingerprint(folder)
    if not replaced:
        if recorded is None and Path(section.name).is_dir():
            logger.warning("%s: no base.json, so whether the base is that of training is not checked", folder.path)
        if recorded is not None and recorded != weights_fingerprint(model_folder(section)):
            raise ModelError(
                f"{section.name}: is not the base that {folder.path} was trained on (the fingerprints of its weights "
                "differ); put the run's base back there, or write its place to model.name in run.yaml"
            )
        return
    own = settings.model.model_copy(update={"name": folder.base_name(), "name_from_run": None})
    _, own = adapter_chain(own)
    if recorded is not None and recorded == weights_fingerprint(model_folder(section)):
        return
    if quantization_of(load_config(own)) == "none":
        raise ModelError(
            f"--base {section.name}: {folder.path} was trained on the 16-bit {own.name}, and these are other weights; "
            "leave out --base"
        )
    _check_replacement(CheckpointWeights(model_folder(own)), CheckpointWeights(model_folder(section)), config, section)


def _check_replacement(
    own: CheckpointWeights, given: CheckpointWeights, config: PreTrainedConfig, section: ModelSection
) -> None:
    """Compare one matrix of the quantised base with that of the 16-bit model given in its place."""
    base = BaseWeights(given, config)
    name = next(name for name, shape in base.shapes().items() if len(shape) == 2 and ".layers." in name)
    quantised, value = own.get(name).float(), base.get(name).float()
    if quantised.shape != value.shape or (quantised - value).norm() > MOST_ROUNDING * value.norm():
        raise ModelError(
            f"--base {section.name}: is not the model that the run's base was quantised from ({name} differs); give "
            "its 16-bit original"
        )


def _recorded_fingerprint(folder: RunFolder) -> str | None:
    if not folder.base.is_file():
        return None
    try:
        recorded = json.loads(folder.base.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder.base}: cannot be read ({type(error).__name__}); copy it from the run") from None
    return recorded if isinstance(recorded, str) else None


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
