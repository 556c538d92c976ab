"""Parley fine-tunes chat models of the Llama family on your own conversations.

Public names are imported when first used: `import parley` is instant and loads no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ParleyError": "parley.errors",
    "RunConfig": "parley.config",
    "SFTConfig": "parley.training.sft_config",
    "SFTTrainer": "parley.training.trainer",
    "DPOConfig": "parley.training.preference.config",
    "DPOTrainer": "parley.training.preference.trainers",
    "KTOConfig": "parley.training.preference.config",
    "KTOTrainer": "parley.training.preference.trainers",
    "GRPOConfig": "parley.training.preference.config",
    "GRPOTrainer": "parley.grpo.trainer",
    "train": "parley.pipeline",
    "export": "parley.exporting.export",
    "plan": "parley.training.plan.run_plan",
    "load_model": "parley.models.load",
    "attach_lora": "parley.models.adapters",
    "render": "parley.data.render",
    "ChatSession": "parley.inference.chat",
    "__version__": "parley.versions",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'parley' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
