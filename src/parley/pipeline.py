"""`train`: the pipeline from end to end, and `demo`, the same on the embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import PrinterCallback

from parley.config import DEMO_DATA, DEMO_MODEL, RunConfig
from parley.data.preview import pieces
from parley.errors import DeviceError, RunError
from parley.evaluation.before_after import Examination, ask, examine, measure, run_questions
from parley.models.adapters import is_identity_adapter
from parley.models.device import pick_device
from parley.training.arguments import sft_config
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.formatting import duration, gib, percent, share
from parley.training.report import Answer, MaskExample, Report, Resources, StepFigures, write_report
from parley.training.resources import (
    Meter,
    Stages,
    device_name,
    give_back_memory,
    memory_peak,
    memory_total,
)
from parley.training.run_folder import RunFolder, is_disk_full
from parley.training.setup import Ready, load, show_mask
from parley.training.trainer import SFTTrainer

LIBRARIES = ("parley-llm", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
DEMO_SETTINGS: dict[str, Any] = {
    "model": DEMO_MODEL,
    "data": DEMO_DATA,
    "training": {
        "max_steps": 200,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "save_steps": 1000,
    },
}


@dataclass
class RunResult:
    """A finished run. `interrupted`: stopped by hand, with what it had learned saved."""

    folder: RunFolder
    report: Report
    model: Any
    tokenizer: Any
    interrupted: bool


def train(config: RunConfig, console: Console | None = None) -> RunResult:
    """Fine-tune as `config` says and leave a run folder with adapter, events and report.

    Raises UsageError, DataError, ModelError, DeviceError or RunError. A full disk or an interruption (Ctrl-C) still
    saves what was learned.
    """
    console = console or Console()
    RunFolder.check_free(config.output)
    args, notes = sft_config(config, config.output / "checkpoints", pick_device(config.model.device))
    stages = Stages()
    ready = load(config, console, stages)
    show_mask(ready.data, ready.tokenizer, console)
    folder = RunFolder.create(config)
    start = Meter(ready.device)
    total = memory_total(ready.device)
    console.print(f"{device_name(ready.device)}: {start.before:.2f} of {total:.1f} GiB in use before training")
    for note in notes:
        console.print(note)

    log = EventLog(folder.events, ready.device)
    bar = ProgressLine(console, log)
    trainer = SFTTrainer(
        model=ready.model,
        args=args,
        train_dataset=ready.data.train,
        eval_dataset=ready.data.heldout,
        processing_class=ready.tokenizer,
        callbacks=[log, bar],
        engine=config.training.engine,
        memory=config.training.memory,
    )
    trainer.remove_callback(PrinterCallback)

    try:
        return _teach(ready, trainer, folder, log, bar, start, stages, notes, console)
    except (OSError, SafetensorError) as error:
        if isinstance(error, RunError) or not is_disk_full(error):
            raise
        raise folder.rescue_weights(trainer.model, ready.tokenizer, trainer.state.global_step) from None
    finally:
        bar.close()


def _teach(
    ready: Ready,
    trainer: SFTTrainer,
    folder: RunFolder,
    log: EventLog,
    bar: ProgressLine,
    start: Meter,
    stages: Stages,
    notes: list[str],
    console: Console,
) -> RunResult:
    """Examine, train, save, examine again, report."""
    stages.end("trainer")
    before = measure(ready, trainer, console)
    asked_later = is_identity_adapter(trainer.model)
    if not asked_later:
        ask(before, ready, trainer, console)
    give_back_memory(ready.device)  # what measuring took, and a decoder's cache
    stages.end("examined before")
    training = Meter(ready.device)
    interrupted = _train(trainer, bar, ready)
    stages.end("training")
    resources = _resources(ready.device, start.before, training.seconds(), trainer, log)
    weights = folder.save_weights(trainer.model, ready.tokenizer, full=ready.config.lora is None)
    stages.end("saving")
    if asked_later:
        ask(before, ready, trainer, console, base=True)
    after = examine(ready, trainer, console)
    stages.end("examined after")
    resources.stages, resources.total_seconds = stages.seconds, sum(stages.seconds.values())

    report = _report(ready, before, after, log)
    report.resources = resources
    report.notes = notes + ([f"stopped by hand at step {trainer.state.global_step}"] if interrupted else [])
    page = write_report(folder.path, report)
    _say(report, weights, page, console)
    return RunResult(folder, report, trainer.model, ready.tokenizer, interrupted)


def demo(output: Path, console: Console | None = None) -> RunResult:
    """The embedded model learns to talk like a pirate."""
    return train(RunConfig.create(DEMO_SETTINGS | {"output": str(output)}), console)


def _train(trainer: SFTTrainer, bar: ProgressLine, ready: Ready) -> bool:
    """Train; True when stopped by hand."""
    try:
        trainer.train()
    except KeyboardInterrupt:
        return True
    except torch.OutOfMemoryError:
        raise DeviceError(_out_of_memory(ready)) from None
    finally:
        bar.close()
    return False


def _out_of_memory(ready: Ready) -> str:
    training = ready.config.training
    return (
        f"out of memory on {device_name(ready.device)} ({memory_total(ready.device):.1f} GiB) with "
        f"{training.per_device_train_batch_size} x up to {ready.config.model.max_seq_length} tokens a batch; lower "
        "training.per_device_train_batch_size or model.max_seq_length, or set model.quantization=nf4"
    )


def _resources(device: torch.device, before: float, seconds: float, trainer: SFTTrainer, log: EventLog) -> Resources:
    """`before`: GiB in use before training; `seconds` of it."""
    tokens = int(log.steps[-1]["num_tokens"]) if log.steps else 0
    return Resources(
        device=device_name(device),
        memory_total_gib=memory_total(device),
        memory_before_gib=before,
        memory_peak_gib=memory_peak(device),
        train_seconds=seconds,
        tokens=tokens,
        supervised_tokens=int(trainer.supervised_tokens),
        tokens_per_s=tokens / seconds,
    )


def _report(ready: Ready, before: Examination, after: Examination, log: EventLog) -> Report:
    config = ready.config
    answers = [
        Answer(question=question.messages, before=old, after=new, reference=question.reference)
        for question, old, new in zip(run_questions(ready), before.answers, after.answers, strict=False)
    ]
    examples = [
        MaskExample(
            origin=origin,
            pieces=[(piece.text, piece.supervised) for piece in pieces(ready.tokenizer, rendered)],
        )
        for origin, rendered in islice(
            zip(ready.data.preview_origins, ready.data.preview, strict=True), config.report.examples
        )
    ]
    steps = [
        StepFigures(
            step=event["step"],
            loss=event["loss"],
            learning_rate=event["learning_rate"],
            grad_norm=event.get("grad_norm"),
            tokens_per_s=event["tokens_per_s"],
            memory_gib=event["memory_gib"],
            token_accuracy=event["mean_token_accuracy"],
            seconds=event["seconds"],
        )
        for event in log.steps
    ]
    return Report(
        title=f"{config.model.name} on {config.data.source}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=config.model.name,
        data=config.data.source,
        before=before.scores,
        after=after.scores,
        answers=answers,
        steps=steps,
        data_summary=ready.data.summary.model_dump(mode="json"),
        data_lines=ready.data.summary.lines(),
        examples=examples,
        settings_yaml=config.to_yaml(),
        versions={name: version(name) for name in LIBRARIES},
        next_commands=_next_commands(config),
    )


def _next_commands(config: RunConfig) -> list[str]:
    if config.model.name != DEMO_MODEL:
        return [f"parley chat {config.output}", f"parley eval {config.output}"]
    return [
        f"parley chat {config.output}",
        "parley train --model meta-llama/Llama-3.2-1B-Instruct --data your-conversations.jsonl",
    ]


def _say(report: Report, weights: Path, page: Path, console: Console) -> None:
    console.print(_comparison(report))
    used = report.resources
    assert used.train_seconds is not None
    assert used.tokens_per_s is not None
    assert used.memory_before_gib is not None
    assert used.memory_peak_gib is not None
    peak = share(used.memory_peak_gib, used.memory_total_gib) or 0.0
    console.print(
        f"trained {duration(used.train_seconds)} at {used.tokens_per_s:,.0f} tokens/s; memory "
        f"{gib(used.memory_before_gib)} before, {gib(used.memory_peak_gib)} at the peak ({peak:.1f}% of all)",
        highlight=False,
    )
    console.print(f"weights: {weights}\nreport:  {page}\nnext:", highlight=False, soft_wrap=True)
    for command in report.next_commands:
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def _comparison(report: Report) -> Table:
    """Scores and a few answers, before and after."""
    assert report.before is not None
    assert report.after is not None
    table = Table("", "before", "after", title="before and after training", title_justify="left")
    rates = {
        "answers in style": (report.before.style_rate, report.after.style_rate),
        "right answers": (report.before.accuracy, report.after.accuracy),
    }
    for name, (old, new) in rates.items():
        if old is not None and new is not None:
            table.add_row(name, percent(old), percent(new))
    if report.before.heldout_loss is not None and report.after.heldout_loss is not None:
        table.add_row("held-out loss", f"{report.before.heldout_loss:.3f}", f"{report.after.heldout_loss:.3f}")
    for answer in report.answers[:3]:
        asked = answer.question if isinstance(answer.question, str) else answer.question[-1].content
        table.add_row(*map(_shortened, (asked, answer.before, answer.after)), style="dim")
    return table


def _shortened(text: str | None, most: int = 200) -> Text:
    text = " ".join((text or "").split())
    return Text(text if len(text) <= most else text[: most - 1] + "…")
