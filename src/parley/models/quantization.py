"""Quantization of a checkpoint: how it was saved, and how to quantise it while loading."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from parley.config import ModelSection
from parley.errors import ModelError
from parley.library_compat.bitsandbytes import log_int8_casts_once


def plan_quantization(config: PreTrainedConfig, section: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The configuration to quantise with while loading; None where the checkpoint is loaded as saved.

    Raises ModelError where the section contradicts a checkpoint that was saved quantised.
    """
    saved = quantization_of(config)
    requested = saved if section.quantization == "auto" else section.quantization
    if saved not in (requested, "none"):
        raise ModelError(
            f"{section.name}: model.quantization is {requested} and the checkpoint was saved as {saved}; set "
            "model.quantization: auto, or give the 16-bit checkpoint it was made from"
        )
    if saved == "nf4":  # the compute dtype follows this device, not the one that saved the checkpoint
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    if requested == "int8":
        log_int8_casts_once()
    if saved != "none" or requested == "none":
        return None
    if requested == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def check_quantised(name: str, model: PreTrainedModel) -> None:
    """Raises ModelError where config.json promises 4-bit weights and the checkpoint's are not."""
    # transformers replaces the layers by config.json alone, and fills them with whatever the file holds.
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit) and not isinstance(module.weight, Params4bit):
            raise ModelError(
                f"{name}: config.json has a quantization_config of 4 bits and the weights of {path} are not quantised; "
                "remove it there, or download the checkpoint again"
            )


def quantization_of(config: PreTrainedConfig) -> str:
    """nf4, fp4, int8, another method's name (gptq, awq, ...), or none, from a model's config."""
    saved = vars(config).get("quantization_config")
    if saved is None:
        return "none"
    # A dict as config.json has it; an object once transformers has loaded the model.
    fields = saved if isinstance(saved, dict) else saved.to_dict()
    if fields.get("load_in_8bit"):
        return "int8"
    if fields.get("load_in_4bit"):
        return str(fields.get("bnb_4bit_quant_type", "fp4"))
    return str(fields.get("quant_method", "unknown"))
