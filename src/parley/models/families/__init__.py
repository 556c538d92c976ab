"""The model families that the fused step and Parley's decoder know; every other one goes through transformers.

`family_of(config)` answers "is this family known". To add one, declare it in a file of its own and list it here.
"""

from __future__ import annotations

from typing import Any

from parley.models.families.family import ModelFamily
from parley.models.families.llama import LLAMA
from parley.models.families.mistral import MISTRAL
from parley.models.families.qwen2 import QWEN2
from parley.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "ModelFamily", "family_of"]

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: Any) -> ModelFamily | None:
    """The family of a transformers configuration by its `model_type`; None where it is not known."""
    return FAMILIES.get(config.model_type)
