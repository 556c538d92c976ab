"""Options of PEFT's LoraConfig that PEFT accepts and then leaves without effect: each is refused in one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from parley.errors import ModelError, UsageError
from parley.models.patterns import matching
from parley.text import one_line

NEEDED = {
    "megatron_core": ("megatron_config", "megatron_config"),
    "qalora_group_size": ("use_qalora", "use_qalora: true"),
}
"""Option, to the field without which PEFT does not read it and how to set that."""
OF_INITS = {"eva_config": "eva", "corda_config": "corda", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
"""Option, to the value of init_lora_weights that reads it."""


def check_fields(fields: dict[str, Any]) -> None:
    """Raises UsageError for values that LoraConfig takes whatever they are, and for options that nothing would read."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    given = {name: value for name, value in fields.items() if value and value != defaults.get(name)}
    for name in given.keys() & OF_INITS.keys():
        init = OF_INITS[name]
        advice = "set lora.loftq: true" if init == "loftq" else "leave it out"
        raise UsageError(f"lora.{name} is read with init_lora_weights: {init} alone, which is not offered; {advice}")
    for name in given.keys() & NEEDED.keys():
        field, setting = NEEDED[name]
        if not fields.get(field):
            raise UsageError(f"lora.{name} has no effect without {setting}; set that too, or leave it out")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(name) or {}, dict):
            raise UsageError(f"lora.{name}: got {one_line(repr(fields[name]), 80)}; wanted module names to numbers")
    for name, value in given.items():
        if known := _fields_of(name):
            unknown = set(value) - known if isinstance(value, dict) else {one_line(repr(value), 60)}
            for key in sorted(map(str, unknown)):
                raise UsageError(f"lora.{name}: unknown key {one_line(key, 60)}; known: {', '.join(sorted(known))}")


def _fields_of(name: str) -> set[str]:
    """The fields of the dataclass that LoraConfig declares for its option `name`; empty where it declares none."""
    declared = get_type_hints(LoraConfig).get(name)
    classes = [kind for kind in (declared, *get_args(declared)) if dataclasses.is_dataclass(kind)]
    return {field.name for kind in classes for field in dataclasses.fields(kind)}


def check_modules(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raises ModelError for a name or pattern in `config` that matches nothing in `model`, which PEFT leaves out."""
    names = [name for name, _ in model.named_modules()]
    _check_names(model, "modules_to_save", config.modules_to_save or (), names, whole=False)
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if not matching(excluded, names, "lora.exclude_modules"):
            raise _unmatched(model, "exclude_modules", excluded)
    else:
        _check_names(model, "exclude_modules", excluded or (), names)
    for field, pattern in [
        *(("rank_pattern", key) for key in config.rank_pattern or {}),
        *(("alpha_pattern", key) for key in config.alpha_pattern or {}),
    ]:
        if not matching(rf"(.*\.)?({pattern})", names, f"lora.{field}"):  # as PEFT's get_pattern_key
            raise _unmatched(model, field, pattern)
    parameters = [name for name, _ in model.named_parameters()]
    _check_names(model, "target_parameters", config.target_parameters or (), parameters)
    _check_invocation(model, config.alora_invocation_tokens or ())


def _check_names(model: nn.Module, field: str, wanted: Iterable[str], names: list[str], *, whole: bool = True) -> None:
    """`whole`: as PEFT matches it, the wanted name is the last parts of a module's; else its last letters."""
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}" if whole else target) for name in names):
            raise _unmatched(model, field, target)


def _check_invocation(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    words = model.get_input_embeddings().num_embeddings
    for token in tokens:
        if not 0 <= token < words:
            raise ModelError(f"lora.alora_invocation_tokens: {token} is no token of the model, which has {words:,}")


def _unmatched(model: nn.Module, field: str, target: str) -> ModelError:
    target = re.sub(r"\s", " ", str(target))
    return ModelError(f"lora.{field} {one_line(target, 80)} matches no module of {type(model).__name__}")
