"""What a run trains with: model, tokenizer, data and adapter, loaded and described on the console."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.text import Text

from parley.config import DEMO_MODEL, RunConfig, TrainingSection
from parley.data.doctor.diagnose import diagnose
from parley.data.doctor.row_reader import RowKind
from parley.data.preferences import Kind, prepare_preferences
from parley.data.prepare import Prepared, prepare
from parley.data.preview import pieces, to_terminal
from parley.data.prompts import prepare_prompts
from parley.errors import DataError, UsageError
from parley.models.adapters import attach_lora, continue_adapter, prepare_full, trainable_summary
from parley.models.device import pick_device
from parley.models.load import load_model
from parley.models.load_sharded import load_sharded
from parley.models.resolve import adapter_chain, local_folder, run_weights
from parley.text import print_text, visible
from parley.training.preference.arguments import completion_tokens
from parley.training.processes import process_count
from parley.training.resource_usage import StageTimer
from parley.training.shard_decision import shards_weights, with_context

GENERATIONS = 8
"""Answers to a prompt by default: TRL's."""


@dataclass
class TrainingSetup:
    """The loaded model with its adapter, its tokenizer, and the rendered data."""

    config: RunConfig
    device: torch.device
    model: Any
    tokenizer: Any
    data: Prepared
    context_parallel: int = 1  # processes that split each row


def prepare_training(config: RunConfig, console: Console, timer: StageTimer | None = None) -> TrainingSetup:
    """Load model, tokenizer and data, and attach the adapter. Writes no file; `timer` gets the stages' seconds.

    Raises DeviceError, ModelError or DataError, each in one line.
    """
    timer = timer or StageTimer()
    device = pick_device(config.model.device)
    if config.lora is None and config.model.dtype == "auto":
        config.model.dtype = "float32"  # an update of 1e-4 is below half a unit of most bfloat16 weights
        print_text(console, "full fine-tuning keeps its weights in float32, so that small updates are not lost")
    resolve_adapter(config, console)
    split = with_context(config)
    ranks = split.training.context_parallel
    assert ranks != "auto"
    sharded = shards_weights(split)
    if sharded:
        print_text(console, f"weights are cut over {process_count()} processes (training.shard)")
    if ranks > 1:
        print_text(console, f"each row is split over {ranks} processes (training.context_parallel)")
    with console.status(Text(f"loading {visible(config.model.name)}")):
        model, tokenizer = load_sharded(config.model) if sharded else load_model(config.model)
    timer.end("model")
    data = prepare_data(config, tokenizer, console)
    timer.end("data")
    if config.lora is None:
        prepare_full(model)  # unfreezes, and refuses quantised weights
    elif isinstance(model, PeftModel):
        continue_adapter(model, config.lora)
    else:
        model = attach_lora(model, config.lora, seed=config.training.seed)
    timer.end("adapter")
    print_text(console, trainable_summary(model))
    return TrainingSetup(config, device, model, tokenizer, data, ranks)


def resolve_adapter(config: RunConfig, console: Console) -> None:
    """Where model.name is an adapter, decide what training starts from, print it, and keep it in `config`.

    Raises UsageError for an adapter that would be continued while lora is null: it would be saved without the base.
    """
    folder = None if config.model.name == DEMO_MODEL else local_folder(config.model.name)
    if folder is not None and (weights := run_weights(folder)) is not None:
        config.model.name = str(weights)  # recorded as the new run's base
    adapters, base = adapter_chain(config.model)
    if not adapters:
        return
    section = config.model
    if section.adapter == "auto":
        section.adapter = "merge" if config.lora is None else "continue"
    if section.adapter == "continue" and config.lora is None:
        raise UsageError(
            f"{section.name} is an adapter, and lora: null trains every weight of a model; set model.adapter: merge "
            f"(train {base.name} with it merged) or new (train {base.name} alone), or leave lora: null out"
        )
    meaning = {
        "continue": "training continues it (model.adapter: merge or new would start another)",
        "merge": "it is merged into its base first, and the result is trained",
        "new": "it is left out, and its base is trained",
    }
    print_text(console, f"{section.name} is an adapter on {base.name}: {meaning[section.adapter]}")


def prepare_data(config: RunConfig, tokenizer: Any, console: Console, keep_tokens: bool = True) -> Prepared:
    """Read, render and check the run's data, print what was found, and see that it has rows for a step.

    keep_tokens: see `prepare`. Raises DataError.
    """
    if config.training.method == "grpo":
        data = prepare_prompts(config.data, tokenizer, config.model.max_seq_length - completion_tokens(config))
        for line in data.summary.lines():
            print_text(console, line)
        _check_steps(config, data)
        return data
    if config.training.method != "sft":
        kind: Kind = "labelled" if config.training.method == "kto" else "pairs"
        data = prepare_preferences(config.data, tokenizer, config.model.max_seq_length, kind)
        row_kind: RowKind = kind
    else:
        length, row_kind = config.model.max_seq_length, "supervised"
        data = prepare(config.data, tokenizer, length, diagnosed=True, keep_tokens=keep_tokens)
    if data.diagnosis is None:
        with console.status("checking the data"):
            data.diagnosis = diagnose(config.data, for_training=True, kind=row_kind)
    # The data doctor says which rows repeat others, with the cure.
    for line in (*data.summary.lines(repeats=False), *data.diagnosis.short_lines()):
        print_text(console, line)
    _check_steps(config, data)
    return data


def _check_steps(config: RunConfig, data: Prepared) -> None:
    if config.training.method == "grpo":
        values = config.training.model_dump()
        batch = config.training.per_device_train_batch_size
        steps = values.get("steps_per_generation") or config.training.gradient_accumulation_steps
        answers = values.get("generation_batch_size") or batch * steps
        prompts = answers // (values.get("num_generations") or GENERATIONS)
        if len(data.train) < prompts:  # TRL leaves out what does not fill a generation
            raise DataError(
                f"{config.data.source}: {len(data.train)} prompts to train on, fewer than the {prompts} of one "
                "generation; lower training.gradient_accumulation_steps or training.per_device_train_batch_size"
            )
        return
    if not data.summary.streaming and planned_steps(config.training, data.summary.kept) == 0:
        raise DataError(
            f"{config.data.source}: {data.summary.kept} rows to train on, fewer than the "
            f"{rows_per_step(config.training)} of one step, and training.dataloader_drop_last leaves the rest out; set "
            "it to false, or lower training.per_device_train_batch_size"
        )


def rows_per_step(training: TrainingSection) -> float:
    """Rows that an optimizer step consumes: a prompt of GRPO has a group of answers, learned once or repeatedly."""
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if training.method != "grpo":
        return rows
    values = training.model_dump()
    return rows / (values.get("num_generations") or GENERATIONS) / (values.get("num_iterations") or 1)


def processes_notes(training: TrainingSection) -> list[str]:
    """How the steps of several processes are made up; nothing for one."""
    count, rows = process_count(), rows_per_step(training)
    if count == 1:
        return []
    notes = [f"{count} processes: the {rows} conversations of each step are dealt out by their tokens"]
    if rows < count:
        notes.append(
            f"{count - rows} of {count} processes have nothing to do in a step of {rows} conversations: raise "
            "training.per_device_train_batch_size, or keep the batch settings for each process with --scale-batch"
        )
    return notes


def planned_steps(training: TrainingSection, rows: int) -> int:
    """Optimizer steps of a run on `rows` rows; 0 where they do not fill a step and an unfilled one is dropped."""
    # The last step of an epoch may be smaller, unless it is dropped: transformers rounds in the same way.
    steps = rows / rows_per_step(training)
    if training.model_dump().get("dataloader_drop_last"):
        steps = math.floor(steps)
        if steps == 0:
            return 0
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(steps * training.num_train_epochs)


def print_mask(data: Prepared, tokenizer: Any, console: Console) -> None:
    """The first training row, supervised tokens in colour; of a pair both answers."""
    for origin, rendered in zip(data.preview_origins, data.preview, strict=True):  # a stream may have none yet
        if origin != data.preview_origins[0]:
            break
        console.print(to_terminal(pieces(tokenizer, rendered)))
