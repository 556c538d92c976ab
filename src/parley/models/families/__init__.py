"""The model families that the fused step and Parley's decoder know; every other one goes through transformers.

`family_of(config)` answers "is this family known". To add one, declare it in a file of its own and list it here.
"""

from __future__ import annotations

from typing import Any

from parley.models.families.family import ModelFamily
from parley.models.families.gemma2 import GEMMA2
from parley.models.families.gemma3 import GEMMA3
from parley.models.families.granite import GRANITE
from parley.models.families.llama import LLAMA
from parley.models.families.mistral import MISTRAL
from parley.models.families.olmo2 import OLMO2
from parley.models.families.phi3 import PHI3
from parley.models.families.qwen2 import QWEN2
from parley.models.families.qwen3 import QWEN3
from parley.models.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "ModelFamily", "family_of"]

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GRANITE, SMOLLM3, OLMO2)
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(config: Any) -> ModelFamily | None:
    """The family of a transformers configuration by its `model_type`; None where it is not known."""
    return FAMILIES.get(config.model_type)
