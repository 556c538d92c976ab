"""Models on the meta device and the bytes of their passes, kept between the plans of one process.

Most changes of settings leave the model alone: the alternatives of a plan that does not fit, and what a user of the
studio changes. Building the modules and simulating a pass are nearly all of a plan's time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from parley.config import LoraSection, ModelSection
from parley.models.meta_model import meta_model
from parley.training.plan.plain_memory import pass_bytes

SEED = 0  # initial values are not computed on the meta device


def cached_meta_model(
    config: PreTrainedConfig, section: ModelSection, dtype: torch.dtype, lora: LoraSection | None
) -> Any:
    """`meta_model` of equal arguments, built once; callers do not change its modules."""
    section_json = section.model_dump_json(include={"name", "quantization", "double_quantization", "trust_remote_code"})
    lora_json = None if lora is None else lora.model_dump_json(exclude_unset=True)
    return _meta_model(type(config).from_dict, config.to_json_string(use_diff=False), section_json, dtype, lora_json)


@lru_cache(maxsize=4)
def _meta_model(
    from_dict: Callable[[dict[str, Any]], PreTrainedConfig],
    config: str,
    section: str,
    dtype: torch.dtype,
    lora: str | None,
) -> Any:
    return meta_model(
        from_dict(json.loads(config)),
        ModelSection.model_validate_json(section),
        dtype,
        None if lora is None else LoraSection.model_validate_json(lora),
        SEED,
    )


cached_pass_bytes = lru_cache(maxsize=32)(pass_bytes)
