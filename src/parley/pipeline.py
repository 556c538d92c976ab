"""The pipeline behind `parley train`, stage by stage; `dry_run`, its checks alone; `demo`, on the embedded model.

rows -> conversations -> tokens + mask -> packed batch -> training step -> adapter -> generate, evaluate, serve
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from trl import SFTConfig

from parley.config import DEMO_DATA, DEMO_MODEL, RunConfig
from parley.errors import ModelError, RunError
from parley.evaluation.answers_during_training import AnswersDuringTraining
from parley.evaluation.evaluate_model import Evaluation, answer_questions, evaluate_model, heldout_scores
from parley.evaluation.failed_run import FailedRun
from parley.evaluation.questions import Question, report_questions
from parley.evaluation.run_report import (
    add_answers_of_events,
    add_evaluations,
    add_event_notes,
    add_step_faults,
    begin_report,
    next_commands,
    steps_of_events,
)
from parley.models.base_answers import base_obstacle, is_identity_adapter
from parley.models.device import pick_device
from parley.models.load import load_config, load_tokenizer, max_positions
from parley.text import print_text
from parley.training.arguments import sft_config
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.check_settings import check_settings
from parley.training.last_good_weights import LastGoodWeights
from parley.training.option_effects import check_tokens, without_effect
from parley.training.prepare_training import (
    TrainingSetup,
    planned_steps,
    prepare_data,
    prepare_training,
    print_mask,
    resolve_adapter,
    rows_per_step,
)
from parley.training.report import Report, write_figures, write_report
from parley.training.resource_usage import ResourceMeter, StageTimer, device_name, memory_total, release_cached_memory
from parley.training.run_folder import RunFolder, is_disk_full
from parley.training.run_outcome import recorded_outcome
from parley.training.run_training import broken_weights, build_trainer, run_training, training_resources
from parley.training.step_faults import StepFaultLog
from parley.training.step_monitor import NonfiniteStepError
from parley.training.terminal_summary import print_summary
from parley.training.validation import Validation

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
    """A finished run. `interrupted`: stopped by Ctrl-C, with the weights of the last step saved."""

    folder: RunFolder
    report: Report
    model: Any
    tokenizer: Any
    interrupted: bool


def train(config: RunConfig, console: Console | None = None) -> RunResult:
    """Fine-tune as `config` says and leave a run folder with adapter, events and report.

    A run that takes no step leaves no folder. Ctrl-C and a full disk after it save the weights.

    Raises UsageError, DataError, ModelError, DeviceError or RunError, and TrainingError where training ends in a loss
    or in weights that are not finite.
    """
    console = console or Console()
    timer = StageTimer()
    # Settings, device and output folder come first: they are checked in a second, a model may take minutes to load.
    RunFolder.check_output(config.output)
    args, notes = _training_arguments(config)

    setup = prepare_training(config, console, timer)
    check_tokens(args, setup.tokenizer, "training.")
    print_mask(setup.data, setup.tokenizer, console)
    questions = report_questions(
        config, setup.data.heldout_examples, setup.tokenizer, max_positions(setup.model.config)
    )

    folder = RunFolder.create(config)
    log = EventLog(folder.events, setup.device)
    try:
        with recorded_outcome(log) as outcome:
            result = _run(setup, args, notes, questions, folder, log, timer, console)
            outcome.stopped = result.interrupted
            return result
    except OSError as error:
        if isinstance(error, RunError) or not is_disk_full(error):
            raise
        raise RunError(f"disk full while writing into {folder.path}; free space and train again") from None
    finally:
        if log.steps_done == 0:
            folder.discard()


def _run(
    setup: TrainingSetup,
    args: SFTConfig,
    notes: list[str],
    questions: list[Question],
    folder: RunFolder,
    log: EventLog,
    timer: StageTimer,
    console: Console,
) -> RunResult:
    """Evaluate, train, save, evaluate again, report: the stages that write into the run folder."""
    config, device = setup.config, setup.device
    memory_before = ResourceMeter(device).before
    total = memory_total(device)
    print_text(console, f"{device_name(device)}: {memory_before:.2f} of {total:.1f} GiB in use before training")
    for note in notes:
        print_text(console, note)
    setup.data.bad_rows.write_to(folder.bad_rows)
    progress = ProgressLine(console, log)
    validation = Validation(config.training, folder.best, console)
    answering = AnswersDuringTraining(setup, questions, log, progress.console)
    last_good = LastGoodWeights()
    trainer = build_trainer(setup, args, [log, progress, answering, last_good, *validation.callbacks])
    trainer.monitor.listeners.append(StepFaultLog(log, folder.nonfinite, setup.tokenizer, progress.progress.console))
    setup.model = trainer.model  # TRL may have wrapped it
    timer.end("trainer")

    # 1. Evaluate the base model. An adapter that starts at zero can be switched off later: its base's answers are
    # generated after training, so that the first step comes sooner.
    before = Evaluation(heldout_scores(setup, trainer, console))
    if (fault := broken_weights(setup)) is not None:
        raise ModelError(f"{config.model.name}: before training, {fault}; the model's weights are damaged")
    base_answers_later = is_identity_adapter(trainer.model) and base_obstacle(trainer.model) is None
    if not base_answers_later:
        answer_questions(before, setup, questions, console)
    report = begin_report(setup, questions, notes)
    report.before = before.scores
    write_figures(folder.path, report)  # from here on `parley report` has something to show
    release_cached_memory(device)
    timer.end("evaluation before")

    # 2. Train, and save the weights unless they are broken.
    meter = ResourceMeter(device)  # resets the peak: that of training is reported
    failed = FailedRun(setup, trainer, folder, log, report, validation, last_good)
    try:
        interrupted = run_training(trainer, setup, folder, log, progress)
    except NonfiniteStepError as error:
        raise failed.stopped_at(error) from None
    trainer.remove_callback(last_good)
    log.kept_step, kept_notes = validation.finish(trainer)
    trainer.remove_callback(answering)
    report.kept_step = log.kept_step if log.kept_step != log.steps_done else None
    timer.end("training")
    report.steps = steps_of_events(log.events)
    add_event_notes(report, log.events)
    add_answers_of_events(report, log.events)
    add_step_faults(report, log.events)
    report.resources = training_resources(trainer, log, memory_before, meter.seconds())
    if interrupted:
        report.notes.append(f"stopped by hand at step {log.steps_done}")
    report.notes += kept_notes
    fault = broken_weights(setup)
    if fault is not None:
        raise failed.diverged(fault)
    weights = folder.save_weights(trainer.model, setup.tokenizer, full=config.lora is None)
    write_figures(folder.path, report)
    timer.end("saving")

    # 3. Evaluate the trained model, and report.
    if base_answers_later:
        answer_questions(before, setup, questions, console, base=True)
    after = evaluate_model(setup, trainer, questions, console)
    timer.end("evaluation after")
    add_evaluations(report, before, after)
    add_event_notes(report, log.events)
    report.resources.stages, report.resources.total_seconds = timer.seconds, timer.total_seconds
    if after.scores.heldout_loss is not None and not isfinite(after.scores.heldout_loss):
        raise failed.diverged("the held-out loss is not finite")
    report.next_commands = next_commands(config)
    page = write_report(folder.path, report)
    print_summary(report, weights, page, console)
    return RunResult(folder, report, trainer.model, setup.tokenizer, interrupted)


def dry_run(config: RunConfig, console: Console) -> None:
    """Check settings and data of `train`, show mask and number of steps; loads no weights, writes nothing."""
    args, notes = _training_arguments(config)
    for note in [*notes, *(f"training.{line}" for line in without_effect(args))]:
        print_text(console, note)
    resolve_adapter(config, console)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    check_tokens(args, tokenizer, "training.")
    data = prepare_data(config, tokenizer, console)
    print_mask(data, tokenizer, console)
    report_questions(config, data.heldout_examples, tokenizer, max_positions(model_config))
    training = config.training
    steps = training.max_steps if data.summary.streaming else planned_steps(training, len(data.train))
    rows = rows_per_step(training)
    print_text(console, f"would train {steps:,} steps of {rows} conversations into {config.output}")


def demo(output: Path, console: Console | None = None) -> RunResult:
    """Train the embedded model to talk like a pirate."""
    return train(RunConfig.create(DEMO_SETTINGS | {"output": str(output)}), console)


def _training_arguments(config: RunConfig) -> tuple[SFTConfig, list[str]]:
    """TRL's arguments, checked, and notes on what was chosen. Raises UsageError or DeviceError."""
    args, notes = sft_config(config, config.output / "checkpoints", pick_device(config.model.device))
    check_settings(config, args)
    return args, notes
