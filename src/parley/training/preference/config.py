"""`parley.DPOConfig`, `parley.KTOConfig` and `parley.GRPOConfig`: TRL's, with a number format that the device has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trl

from parley.training.sft_config import DeviceDefaults


@dataclass
class DPOConfig(DeviceDefaults, trl.DPOConfig):
    """TRL's DPOConfig, which a script for a GPU can construct on a CPU too; with the options of ORPO and SimPO.

    `bf16` and `logging_nan_inf_filter` differ from TRL's as in parley.SFTConfig.
    """

    simpo_gamma: float = field(default=0.5, metadata={"help": "Target reward margin of SimPO."})
    cpo_alpha: float = field(
        default=0.0, metadata={"help": "SimPO: weight of the chosen answers' cross-entropy (1.0 in trl.CPOConfig)."}
    )


@dataclass
class KTOConfig(DeviceDefaults, trl.KTOConfig):
    """TRL's KTOConfig; `bf16` and `logging_nan_inf_filter` differ from TRL's as in parley.SFTConfig."""


@dataclass
class GRPOConfig(DeviceDefaults, trl.GRPOConfig):
    """TRL's GRPOConfig; `bf16` and `logging_nan_inf_filter` differ from TRL's as in parley.SFTConfig."""

    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; longer ones lose their start, as in older releases of TRL."},
    )


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1, "loss_type": ["ipo"]},
    "kto": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "grpo": {},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
}
"""By training.method, what is used in place of a missing setting. SimPO's are from its paper (gamma / beta = 0.5)."""
