"""`parley.SFTConfig`: TRL's SFTConfig with a number format that the device has."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import trl
from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass
class DeviceDefaults:
    """What Parley's configs change of TRL's, in front of which they name this class.

    It is no subclass of TrainingArguments: a dataclass would then take all of their defaults in place of TRL's.
    """

    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to use bf16 mixed precision; without a value, where the GPU has it."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to replace NaN and infinite losses by the mean when logging."}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps to warm up in; `warmup_steps` below 1 means the same."}
    )

    def __post_init__(self) -> None:
        args = cast(TrainingArguments, self)
        take_warmup_ratio(args)
        drop_unavailable_formats(args)
        super().__post_init__()  # type: ignore[misc]  # TRL's


@dataclass
class SFTConfig(DeviceDefaults, trl.SFTConfig):
    """TRL's SFTConfig, which a script for a GPU can construct on a CPU too.

    What differs from TRL's:
    - `bf16`: without a value, where the GPU has it; TRL's default needs such a GPU. Where neither the GPU nor `use_cpu`
      gives it, `bf16=True` and `fp16=True` are dropped with a warning, and training is in float32;
    - `warmup_ratio`, which TRL dropped, and `max_seq_length`, the older name of `max_length`, are accepted;
    - `logging_nan_inf_filter`: False, so that a loss that is not a number is logged as such.
    """

    max_seq_length: int | None = field(default=None, metadata={"help": "Older name of `max_length`."})

    def __post_init__(self) -> None:
        self.max_length: int | None
        if self.max_seq_length is not None:
            self.max_length = self.max_seq_length
        super().__post_init__()


def take_warmup_ratio(args: Any) -> None:
    """`warmup_ratio`, which TRL dropped, as the `warmup_steps` below 1 that took its place."""
    if args.warmup_ratio and not args.warmup_steps:
        args.warmup_steps = args.warmup_ratio


def drop_unavailable_formats(args: TrainingArguments) -> None:
    """Decide `bf16` where it has no value, and drop what the device lacks with a warning."""
    if args.bf16 is None:
        args.bf16 = not args.fp16 and not args.use_cpu and has_bf16()
    for name in unavailable_formats(args):
        logger.warning("%s=True: this device has no %s; training in float32", name, name)
        setattr(args, name, False)


def has_bf16() -> bool:
    """Whether the GPU has bf16 in hardware; False without a GPU."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def unavailable_formats(args: TrainingArguments) -> list[str]:
    """Those of bf16 and fp16 that `args` wants and the device lacks. A CPU has bf16 once `use_cpu` asks for the CPU."""
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    lacking = []
    if args.bf16 and not (args.use_cpu or has_bf16()):
        lacking.append("bf16")
    if args.fp16 and not on_gpu:
        lacking.append("fp16")
    return lacking
