"""A PEFT adapter's folder on disk: its settings and tensors, checked before anything is built from them.

An adapter folder is data that one was given. Its settings are read into typed fields, so that nothing in them can name
code to import, repeat layers or allocate more than the tensors beside them need; only safetensors are read, as a pickle
can run code.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from parley.errors import ModelError
from parley.models.json_files import read_json_object, validated
from parley.text import one_line

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN_PATTERN = re.compile(r"\^?[\w.\\*+?$-]{1,300}")
"""What a key of rank_pattern may be. PEFT matches it with `re`; without groups it takes polynomial time at worst."""
MOST_LAYERS = 1024  # that layer_replication may make; the largest open models have 126
MOST_REPEATS = 2  # of * and + in such a key

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Rank = Annotated[StrictInt, Field(ge=1)]
Names = list[StrictStr] | None
Options = dict[str, StrictBool | StrictInt | Number | StrictStr | None] | None


class AdapterFields(BaseModel):
    """The fields of adapter_config.json that say how to build a LoRA adapter, with their types."""

    model_config = ConfigDict(extra="ignore")

    peft_type: StrictStr | None = None
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: StrictStr | None = None
    revision: StrictStr | None = None
    r: Rank = 8
    lora_alpha: Number = 8
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: list[StrictStr] | StrictStr | None = None
    exclude_modules: list[StrictStr] | StrictStr | None = None
    modules_to_save: Names = None
    layers_to_transform: list[StrictInt] | StrictInt | None = None
    layers_pattern: list[StrictStr] | StrictStr | None = None
    rank_pattern: dict[str, Rank] | None = Field(default_factory=dict)
    alpha_pattern: dict[str, Number] | None = Field(default_factory=dict)
    target_parameters: Names = None
    trainable_token_indices: list[StrictInt] | dict[str, list[StrictInt]] | None = None
    layer_replication: list[tuple[StrictInt, StrictInt]] | None = None
    alora_invocation_tokens: list[StrictInt] | None = None
    fan_in_fan_out: StrictBool = False
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    lora_bias: StrictBool = False
    init_lora_weights: StrictBool | StrictStr = True
    use_qalora: StrictBool = False
    qalora_group_size: Rank = 16
    ensure_weight_tying: StrictBool = False
    use_bdlora: Options = None
    velora_config: Options = None
    monteclora_config: Options = None
    kasa_config: Options = None
    arrow_config: Options = None


BOOKKEEPING = {
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "lora_ga_config", "loftq_config",
    "megatron_core", "peft_version", "runtime_config",
}  # fmt: skip
"""Fields that do not change what a saved adapter computes."""


def read_adapter_fields(folder: Path) -> AdapterFields:
    """The settings in `folder`'s adapter_config.json. Raises ModelError for a file that is no LoRA adapter's."""
    path = folder / CONFIG_FILE
    values = read_json_object(path)
    kind = values.get("peft_type")
    if kind != "LORA":
        found = "names no peft_type" if kind is None else f"peft_type is {one_line(repr(kind), 60)}"
        raise ModelError(f"{path}: {found}; Parley reads LoRA adapters (peft_type LORA)")
    fields = validated(AdapterFields, values, path)
    _check_patterns(path, fields)
    _check_unread(path, values)
    replicated = sum(max(0, end - start) for start, end in fields.layer_replication or [])
    if replicated > MOST_LAYERS:
        raise ModelError(f"{path}: layer_replication makes {replicated:,} layers; at most {MOST_LAYERS:,} are read")
    return fields


def _check_patterns(path: Path, fields: AdapterFields) -> None:
    layers = [fields.layers_pattern] if isinstance(fields.layers_pattern, str) else fields.layers_pattern or []
    for pattern in [*(fields.rank_pattern or {}), *(fields.alpha_pattern or {}), *layers]:
        if not is_plain_pattern(pattern):
            raise ModelError(
                f"{path}: {one_line(repr(pattern), 60)} is no plain pattern of module names; write the names out"
            )


def is_plain_pattern(pattern: str) -> bool:
    """Whether PEFT can match `pattern` with `re` in bounded time."""
    return PLAIN_PATTERN.fullmatch(pattern) is not None and pattern.count("*") + pattern.count("+") <= MOST_REPEATS


def _check_unread(path: Path, values: dict[str, Any]) -> None:
    """Refuse features that would be left out; say which unknown keys are."""
    read = set(AdapterFields.model_fields) | BOOKKEEPING
    defaults = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name, value in values.items():
        if name in read or value is None or value is False or value in ({}, []):
            continue
        if name not in defaults:
            logger.warning("%s: unknown key %s is ignored", path, one_line(repr(name), 60))
        elif value != defaults[name].default:
            raise ModelError(f"{path}: {name} is set, which Parley does not read; merge the adapter with PEFT first")


def lora_config(fields: AdapterFields) -> LoraConfig:
    """PEFT's settings for an adapter that is loaded and may be trained further."""
    named = fields.model_dump(exclude={"peft_type"}, exclude_none=True)
    try:
        return LoraConfig(**{**named, "task_type": "CAUSAL_LM", "inference_mode": False})
    except ImportError as error:  # PEFT's loftq needs scipy
        raise ModelError(
            f"the adapter's init_lora_weights is {fields.init_lora_weights}: {missing_package(error)}"
        ) from None


def missing_package(error: ImportError) -> str:
    """The command that installs what an ImportError of PEFT names in quotes: "pip install scipy"."""
    quoted = re.search(r"'([\w.-]+)'", str(error))
    name = error.name or (quoted[1] if quoted else None)
    return f"{one_line(error)} (pip install {name})" if name else one_line(error)


def read_adapter_weights(folder: Path, fields: AdapterFields) -> dict[str, Tensor]:
    """The tensors in `folder`, on the CPU, by the keys of the file.

    Raises ModelError where there are none, they are damaged, do not have the rank that `fields` names, or hold values
    that are not finite.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ModelError(
                f"{folder}: its weights are pickled (adapter_model.bin), and a pickle can run code; save the adapter "
                "as safetensors"
            )
        raise ModelError(f"{folder}: no {WEIGHTS_FILE}; the adapter was not saved completely")
    try:
        _check_ranks(path, fields)
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged ({one_line(error)}); save it again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ModelError(f"{path}: {one_line(name, 120)} has the type {value.dtype}, wanted floating-point values")
        if not torch.isfinite(value.float()).all():
            raise ModelError(
                f"{path}: {one_line(name, 120)} holds values that are not finite (NaN or infinity), as a diverged "
                "training leaves them; train again with a lower learning rate"
            )
    return weights


def _check_ranks(path: Path, fields: AdapterFields) -> None:
    """The ranks that the settings name against the file's header, before PEFT allocates matrices of these ranks."""
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    ranks = [shape[0] for name, shape in shapes.items() if ("lora_A" in name or "lora_embedding_A" in name) and shape]
    if not ranks:
        raise ModelError(f"{path}: no LoRA matrices in it; save the adapter again")
    largest = max(ranks)
    for name, rank in {"r": fields.r, **(fields.rank_pattern or {})}.items():
        # Where rank_pattern covers every layer, r itself is not in the file.
        if rank > largest and not (name == "r" and fields.rank_pattern and rank <= 1024):
            raise ModelError(
                f"{path.parent}: the adapter does not fit its {CONFIG_FILE} ({name} is {rank:,} and the largest matrix "
                f"has rank {largest:,}); save the adapter again"
            )
