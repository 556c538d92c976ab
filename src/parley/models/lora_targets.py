"""Which modules of a model an adapter is attached to: lora.target_modules, checked against the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parley.config import LLAMA_PROJECTIONS, LoraSection
from parley.errors import ModelError, UsageError

logger = logging.getLogger(__name__)

LINEAR = (torch.nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, torch.nn.Embedding, torch.nn.Conv1d)


def target_modules(model: PreTrainedModel, section: LoraSection) -> list[str] | str:
    """The section's target modules, once each of them is known to match a module of `model`.

    Raises ModelError for names that match nothing, UsageError for a pattern that is no regular expression.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    requested = section.target_modules
    if requested == "all-linear":
        return requested
    if isinstance(requested, str):
        if not any(_matches_pattern(requested, name) for name in names):
            raise ModelError(f"lora.target_modules {requested!r} matches no module; {_advice(names)}")
        return requested
    absent = [target for target in requested if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent and sorted(requested) == sorted(LLAMA_PROJECTIONS):
        # The default names are Llama's. A family with other names gets the equivalent: all linear layers but the head.
        linear = _linear_leaves(model)
        logger.warning(
            "%s has no %s: the adapter goes on all its linear layers instead (%s)",
            model.name_or_path or type(model).__name__,
            ", ".join(absent),
            ", ".join(linear),
        )
        return linear
    if absent or not requested:
        raise ModelError(
            f"lora.target_modules {', '.join(absent) or '[]'} matches no module of {type(model).__name__}; "
            f"{_advice(names)}"
        )
    return requested


def _matches_pattern(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"lora.target_modules {pattern!r}: not a regular expression ({error})") from None


def _linear_leaves(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head]
    return _leaves(layers)


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of module names, without embeddings and head, as target_modules lists them."""
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head", "embed_tokens"})


def _advice(names: Iterable[str]) -> str:
    return f"it has {', '.join(_leaves(names))}; choose of these, or all-linear"
