"""What a run starts from: model, tokenizer, data and adapter, loaded and reported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from parley.config import RunConfig
from parley.data.prepare import Prepared, prepare
from parley.data.preview import pieces, to_terminal
from parley.models.adapters import attach_lora, prepare_full, trainable_summary
from parley.models.device import pick_device
from parley.models.load import load_model, load_tokenizer
from parley.training.resources import Stages


@dataclass
class Ready:
    """The loaded model with its adapter, its tokenizer, and the rendered data."""

    config: RunConfig
    device: torch.device
    model: Any
    tokenizer: Any
    data: Prepared


def load(config: RunConfig, console: Console, stages: Stages | None = None) -> Ready:
    """Load model, tokenizer and data, and attach the adapter. Nothing is written. `stages` is told the seconds.

    Raises DeviceError, ModelError or DataError, each in one line.
    """
    stages = stages or Stages()
    device = pick_device(config.model.device)
    if config.lora is None and config.model.dtype == "auto":
        config.model.dtype = "float32"
        console.print("full fine-tuning keeps its weights in float32, so that small updates are not lost")
    with console.status(f"loading {config.model.name}"):
        model, tokenizer = load_model(config.model)
    stages.end("model")
    data = prepare(config.data, tokenizer, config.model.max_seq_length)
    stages.end("data")
    _say_data(data, console)
    if config.lora is None:
        prepare_full(model)
    else:
        model = attach_lora(model, config.lora, seed=config.training.seed)
    stages.end("adapter")
    console.print(trainable_summary(model), highlight=False)
    return Ready(config, device, model, tokenizer, data)


def plan(config: RunConfig, console: Console) -> None:
    """What `train` would do, without the model's weights and without writing anything: data, mask and steps."""
    tokenizer = load_tokenizer(config.model)
    data = prepare(config.data, tokenizer, config.model.max_seq_length)
    _say_data(data, console)
    show_mask(data, tokenizer, console)
    training = config.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if training.max_steps > 0:
        console.print(f"would train {training.max_steps:,} steps of {per_step} conversations into {config.output}")
    else:
        steps = math.ceil(len(data.train) / per_step * training.num_train_epochs)
        console.print(f"would train {steps:,} steps of {per_step} conversations into {config.output}")


def show_mask(data: Prepared, tokenizer: Any, console: Console) -> None:
    """The first training row: what is coloured is learned."""
    for rendered in data.preview[:1]:
        console.print(to_terminal(pieces(tokenizer, rendered)))


def _say_data(data: Prepared, console: Console) -> None:
    for line in data.summary.lines():
        console.print(line, highlight=False)
