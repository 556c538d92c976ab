"""What a run trains with: model, tokenizer, data and adapter, loaded and described on the console."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from parley.config import RunConfig
from parley.data.prepare import Prepared, prepare
from parley.data.preview import pieces, to_terminal
from parley.models.adapters import attach_lora, prepare_full, trainable_summary
from parley.models.device import pick_device
from parley.models.load import load_model, load_tokenizer
from parley.text import print_text, visible
from parley.training.resources import StageTimer


@dataclass
class TrainingSetup:
    """The loaded model with its adapter, its tokenizer, and the rendered data."""

    config: RunConfig
    device: torch.device
    model: Any
    tokenizer: Any
    data: Prepared


def prepare_training(config: RunConfig, console: Console, timer: StageTimer | None = None) -> TrainingSetup:
    """Load model, tokenizer and data, and attach the adapter. Writes no file; `timer` gets the stages' seconds.

    Raises DeviceError, ModelError or DataError, each in one line.
    """
    timer = timer or StageTimer()
    device = pick_device(config.model.device)
    if config.lora is None and config.model.dtype == "auto":
        config.model.dtype = "float32"  # an update of 1e-4 is below half a unit of most bfloat16 weights
        print_text(console, "full fine-tuning keeps its weights in float32, so that small updates are not lost")
    with console.status(Text(f"loading {visible(config.model.name)}")):
        model, tokenizer = load_model(config.model)
    timer.end("model")
    data = prepare(config.data, tokenizer, config.model.max_seq_length)
    timer.end("data")
    print_data_summary(data, console)
    if config.lora is None:
        prepare_full(model)
    else:
        model = attach_lora(model, config.lora, seed=config.training.seed)
    timer.end("adapter")
    print_text(console, trainable_summary(model))
    return TrainingSetup(config, device, model, tokenizer, data)


def dry_run(config: RunConfig, console: Console) -> None:
    """Show the data, the mask and the number of steps of `train`, without model weights and without writing."""
    tokenizer = load_tokenizer(config.model)
    data = prepare(config.data, tokenizer, config.model.max_seq_length)
    print_data_summary(data, console)
    print_mask(data, tokenizer, console)
    training = config.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if training.max_steps > 0:
        steps = training.max_steps
    else:
        steps = math.ceil(len(data.train) / batch * training.num_train_epochs)
    print_text(console, f"would train {steps:,} steps of {batch} conversations into {config.output}")


def print_data_summary(data: Prepared, console: Console) -> None:
    for line in data.summary.lines():
        print_text(console, line)


def print_mask(data: Prepared, tokenizer: Any, console: Console) -> None:
    """The first training row, supervised tokens in colour."""
    for rendered in data.preview[:1]:
        console.print(to_terminal(pieces(tokenizer, rendered)))
