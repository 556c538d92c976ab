"""How a checkpoint is quantised, and what loading it should do about it."""

from __future__ import annotations

import logging

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig

from parley.config import ModelSection
from parley.errors import ModelError

EIGHT_BIT_LOG = "bitsandbytes.autograd._functions"


def plan_quantization(config: PreTrainedConfig, section: ModelSection, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How to quantise while loading; None where the checkpoint is taken as it was saved."""
    saved = quantization_of(config)
    wanted = saved if section.quantization == "auto" else section.quantization
    if saved not in (wanted, "none"):
        raise ModelError(
            f"{section.name}: model.quantization is {wanted} and the checkpoint was saved as {saved}; set "
            "model.quantization: auto, or give the 16-bit checkpoint it was made from"
        )
    if saved == "nf4":  # the type of its matrix products is this machine's choice, not that of the one that saved it
        config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    if wanted == "int8":
        logging.getLogger(EIGHT_BIT_LOG).addFilter(_said_once)
    if saved != "none" or wanted == "none":
        return None
    if wanted == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def quantization_of(config: PreTrainedConfig) -> str:
    """nf4, fp4, int8, another method's name (gptq, awq, ...), or none, from a model's config."""
    saved = vars(config).get("quantization_config")
    if saved is None:
        return "none"
    fields = saved if isinstance(saved, dict) else saved.to_dict()
    if fields.get("load_in_8bit"):
        return "int8"
    if fields.get("load_in_4bit"):
        return str(fields.get("bnb_4bit_quant_type", "fp4"))
    return str(fields.get("quant_method", "unknown"))


class _Once(logging.Filter):
    """bitsandbytes tells of the same cast in every 8-bit layer of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.told
        self.told.add(message)
        return new


_said_once = _Once()
