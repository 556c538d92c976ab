"""Which modules of a model an adapter is attached to: lora.target_modules, checked against the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parley.config import LLAMA_PROJECTIONS, LoraSection
from parley.errors import ModelError
from parley.models.patterns import matching
from parley.text import one_line

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
        if not any(map(_is_router, model.modules())):
            return requested
        logger.warning("all-linear leaves out the routers of %s, which return more than a product", _name_of(model))
        return _linear_leaves(model)
    if isinstance(requested, str):
        matched = matching(requested, names, "lora.target_modules")
        if not matched:
            raise ModelError(f"lora.target_modules {one_line(requested, 80)!r} matches no module; {_advice(names)}")
        # PEFT matches a text with `re`, which has no time limit; the names it matched give the same adapter. It refuses
        # a text together with these fields, and does so still.
        fields = section.model_dump()
        return requested if fields.get("layers_to_transform") or fields.get("layers_pattern") else matched
    absent = [target for target in requested if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent and sorted(requested) == sorted(LLAMA_PROJECTIONS):
        # The default names are Llama's. A family with other names gets the equivalent: all linear layers but the head.
        linear = _linear_leaves(model)
        logger.warning(
            "%s has no %s: the adapter is attached to all its linear layers instead (%s)",
            _name_of(model),
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


def _linear_leaves(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not head and not _is_router(module)
    ]
    return _leaves(layers)


def _is_router(module: torch.nn.Module) -> bool:
    """A linear layer whose forward pass also chooses experts (Phi-3.5-MoE, Llama 4): PEFT wants one tensor of it."""
    return isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")


def _name_of(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of module names, without embeddings and head, as target_modules lists them."""
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head", "embed_tokens"})


def _advice(names: Iterable[str]) -> str:
    return f"it has {', '.join(_leaves(names))}; choose of these, or all-linear"
