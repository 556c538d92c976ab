"""Loads what a user names, a run's folder or any model, with the settings it is served with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from parley.config import DEMO_MODEL, GenerationSection, ModelSection, RunConfig
from parley.data.supervision import ControlText
from parley.models.base_answers import base_obstacle
from parley.models.load import load_model
from parley.models.resolve import local_folder
from parley.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model and the settings that its run kept.

    Attributes:
        names: names it is served under; True marks the base model, the adapter switched off.
        settings: generation settings.
        system: system turn of conversations that bring none.
        golden: file of the run's golden token ids.
        control_tokens: how control-token text in messages is encoded, as in training.
    """

    model: Any
    tokenizer: Any
    names: dict[str, bool]
    settings: GenerationSection
    system: str | None = None
    golden: Path | None = None
    control_tokens: ControlText = "auto"


def load_for_inference(source: str, *, trust_remote_code: bool = False) -> LoadedModel:
    """Load a run, an adapter or a model. A run is named after its folder, its base model as in the run's settings.

    `trust_remote_code` runs code that the model's repository ships, whatever a run's own settings say.

    Raises ModelError, RunError or DeviceError.
    """
    if not RunFolder.is_run(source):
        model, tokenizer = load_model(model_section(source, trust_remote_code=trust_remote_code))
        base = model.get_base_model().name_or_path if _serves_base(model) else None
        return LoadedModel(model, tokenizer, served_names(source, base), GenerationSection())
    run = RunFolder.open(source, trust_remote_code=trust_remote_code)
    config = run.config
    model, tokenizer = run.load()
    names = served_names(source, _base_name(model, run) if _serves_base(model) else None)
    data = config.data
    return LoadedModel(model, tokenizer, names, config.generation, data.system, run.golden, data.control_tokens)


def model_section(source: str, *, trust_remote_code: bool = False) -> ModelSection:
    """The settings that load the model called `source`. Raises UsageError for what can be no name."""
    return RunConfig.create({"model": {"name": source, "trust_remote_code": trust_remote_code}}).model


def _serves_base(model: Any) -> bool:
    """Whether the base model can be served too; logs why not where the adapter changed it."""
    reason = base_obstacle(model)
    if reason is not None and isinstance(model, PeftModel):
        logger.warning("only the tuned model is served: %s", reason)
    return reason is None


def _base_name(model: PeftModel, run: RunFolder) -> str:
    """The base as the run's settings name it; its own name where these name an adapter (then model.adapter is set)."""
    return run.base_name() if run.config.model.adapter == "auto" else model.get_base_model().name_or_path


def served_names(source: str, base: str | None) -> dict[str, bool]:
    """The names of a model and of its base model, if any; the base's is marked True."""
    name = short_name(source)
    if base is None:
        return {name: False}
    base_name = short_name(base)
    return {name: False, base_name if base_name != name else f"{base_name}-base": True}


def short_name(source: str) -> str:
    """The last part of a folder's path; a hub id unchanged."""
    folder = None if source == DEMO_MODEL else local_folder(source)
    return source if folder is None else folder.name
