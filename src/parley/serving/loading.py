"""From what a user names, a run's folder or any model, to what the server answers with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from parley.config import DEMO_MODEL, GenerationSection, ModelSection
from parley.models.adapters import base_obstacle
from parley.models.folder import local_folder
from parley.models.load import load_model
from parley.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A loaded model and what is known of it. `names`: as in Served; `golden`: the run's golden ids."""

    model: Any
    tokenizer: Any
    names: dict[str, bool]
    settings: GenerationSection
    system: str | None = None
    golden: Path | None = None


def open_source(source: str) -> Source:
    """Load a run, an adapter or a model. A run answers under its folder's name, its base under the base's own.

    Raises ModelError, RunError or DeviceError.
    """
    if not RunFolder.is_run(source):
        model, tokenizer = load_model(ModelSection(name=source))
        base = model.get_base_model().name_or_path if _offers_base(model) else None
        return Source(model, tokenizer, names_of(source, base), GenerationSection())
    run = RunFolder.open(source)
    config = run.config
    model, tokenizer = run.load()
    names = names_of(source, config.model.name if _offers_base(model) else None)
    return Source(model, tokenizer, names, config.generation, config.data.system, run.golden)


def _offers_base(model: Any) -> bool:
    """Whether the base can answer too; where its adapter stands in the way, says so."""
    reason = base_obstacle(model)
    if reason is not None and isinstance(model, PeftModel):
        logger.warning("only the tuned model answers: %s", reason)
    return reason is None


def names_of(tuned: str, base: str | None) -> dict[str, bool]:
    """The names a model answers under, the tuned one first; the base's is marked."""
    name = name_of(tuned)
    if base is None:
        return {name: False}
    other = name_of(base)
    return {name: False, other if other != name else f"{other}-base": True}


def name_of(source: str) -> str:
    """A folder's own name; a hub id as it is."""
    folder = None if source == DEMO_MODEL else local_folder(source)
    return source if folder is None else folder.name
