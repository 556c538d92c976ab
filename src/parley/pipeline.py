"""The pipeline behind `parley train`, stage by stage; `dry_run`, its checks alone; `demo`, on the embedded model.

rows -> conversations -> tokens + mask -> packed batch -> training step -> adapter -> generate, evaluate, serve
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from signal import Signals
from typing import Any, Literal, cast

from rich.console import Console

from parley.config import DEMO_DATA, DEMO_MODEL, DEMO_PREFERENCES, DEMO_PROMPTS, RunConfig
from parley.errors import ModelError, RunError, UsageError
from parley.evaluation.answers_during_training import AnswersDuringTraining
from parley.evaluation.evaluate_model import Evaluation, answer_questions, evaluate_model, heldout_scores
from parley.evaluation.failed_run import FailedRun
from parley.evaluation.questions import Question, report_questions
from parley.evaluation.report_events import add_event_notes, add_events, steps_of_events
from parley.evaluation.run_report import add_evaluations, begin_report, next_commands
from parley.grpo.rewards import load_rewards
from parley.grpo.samples import add_sample_log
from parley.grpo.trainer import GRPOTrainer
from parley.models.base_answers import base_obstacle, is_identity_adapter
from parley.models.device import pick_device
from parley.models.load import load_config, load_tokenizer, max_positions
from parley.text import print_text
from parley.training.arguments import sft_config
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.check_settings import check_settings
from parley.training.checkpoint import write_fault
from parley.training.determinism import fix_cublas_workspaces
from parley.training.fused_trainer import FusedTrainer
from parley.training.json_lines import WEIGHTS
from parley.training.last_good_weights import LastGoodWeights
from parley.training.option_effects import check_tokens, without_effect
from parley.training.preference.arguments import preference_config
from parley.training.prepare_training import (
    TrainingSetup,
    planned_steps,
    prepare_data,
    prepare_training,
    print_mask,
    processes_notes,
    resolve_adapter,
    rows_per_step,
)
from parley.training.processes import from_main, is_main_process, joined_processes, on_sudden_end
from parley.training.report import Report, write_figures, write_report
from parley.training.resource_usage import ResourceMeter, StageTimer, device_name, memory_total, release_cached_memory
from parley.training.resume_run import ResumedRun, open_to_resume
from parley.training.run_folder import RunFolder
from parley.training.run_outcome import recorded_outcome
from parley.training.run_training import broken_weights, build_trainer, run_training, training_resources
from parley.training.scratch_folder import ScratchFolder
from parley.training.signals import StopSignals
from parley.training.step_faults import StepFaultLog
from parley.training.step_monitor import NonfiniteStepError
from parley.training.terminal_summary import print_summary
from parley.training.validation import Validation
from parley.units import counted

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

DEMO_DPO_SETTINGS: dict[str, Any] = {
    "model": DEMO_MODEL,
    "data": DEMO_PREFERENCES,
    "training": {
        "method": "dpo",
        "max_steps": 60,
        "learning_rate": 3e-4,
        "gradient_checkpointing": False,
        "save_steps": 1000,
    },
}

DEMO_GRPO_SETTINGS: dict[str, Any] = {
    "model": DEMO_MODEL,
    "data": {"source": DEMO_PROMPTS, "system": "Talk like a pirate.", "heldout_rows": 50},
    "training": {
        "method": "grpo",
        "rewards": ["parley.rewards:ends_with"],
        "max_steps": 20,
        "learning_rate": 3e-3,
        "max_completion_length": 48,
        "gradient_checkpointing": False,
        "save_steps": 1000,
    },
}
DEMO_METHODS = {"sft": DEMO_SETTINGS, "dpo": DEMO_DPO_SETTINGS, "grpo": DEMO_GRPO_SETTINGS}


@dataclass
class RunResult:
    """A run that is finished, or was stopped by `signal`: then its last step is saved, and `resume` continues it."""

    folder: RunFolder
    report: Report
    model: Any
    tokenizer: Any
    signal: Signals | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped it: Ctrl-C, SIGTERM or SIGHUP."""
        return self.signal is not None

    def resume(self, console: Console | None = None) -> RunResult:
        return train(resume=self.folder.path, console=console)


def train(
    config: RunConfig | None = None, console: Console | None = None, *, resume: str | Path | None = None
) -> RunResult:
    """Fine-tune as `config` says and leave a run folder with adapter, events and report.

    A run that takes no step leaves no folder. Ctrl-C, SIGTERM and SIGHUP end training after the step under way, with a
    checkpoint; a second one raises KeyboardInterrupt at once. SIGUSR1 saves a checkpoint and continues.

    Where a launcher started several processes (torchrun), they train together, and the first one prints and writes.

    Args:
        resume: a run's folder, to continue from its last whole checkpoint. `config` may then change what does not
            change a step: more steps, logging, saving, evaluation; without it the run's own settings are used.

    Raises UsageError, DataError, ModelError, DeviceError or RunError, and TrainingError where training ends in a loss
    or in weights that are not finite.
    """
    with joined_processes(), StopSignals() as signals, ExitStack() as stack:
        console = console or Console()
        if not is_main_process():
            console = Console(quiet=True)
        if resume is not None:
            resumed = _open_to_resume(Path(resume), config, console)
            stack.callback(resumed.folder.unlock)
            return _train(resumed.config, console, signals, resumed)
        if config is None:
            raise UsageError("nothing to train: give the settings of a run, or the folder of one to resume")
        return _train(config, console, signals, None)


def _train(config: RunConfig, console: Console, signals: StopSignals, resumed: ResumedRun | None) -> RunResult:
    timer = StageTimer()
    # Settings, device and output folder come first: they are checked in a second, a model may take minutes to load.
    if resumed is None and is_main_process():
        RunFolder.check_output(config.output)
    args, notes = training_arguments(config)
    make = trainer_maker(config)
    if config.training.deterministic:
        fix_cublas_workspaces()
    notes += processes_notes(config.training)

    setup = prepare_training(config, console, timer)
    check_tokens(args, setup.tokenizer, "training.")
    print_mask(setup.data, setup.tokenizer, console)
    questions = report_questions(
        config, setup.data.heldout_examples, setup.tokenizer, max_positions(setup.model.config)
    )

    folder = _new_folder(config) if resumed is None else resumed.folder
    log = EventLog(folder.events, setup.device)

    def leave() -> None:
        if log.steps_done == 0 and resumed is None:
            folder.discard()
        folder.unlock()

    on_sudden_end(leave)
    try:
        with recorded_outcome(log) as outcome:
            run = _Run(setup, args, make, notes, questions, folder, log, timer, console, signals, resumed)
            result = run.run()
            outcome.stopped = result.interrupted
            return result
    except OSError as error:
        if isinstance(error, RunError) or (fault := write_fault(error)) is None:
            raise
        raise RunError(f"{fault} while writing into {folder.path}; free space, then {folder.resume_command}") from None
    finally:
        leave()


@dataclass
class _Run:
    """The stages that write into the run folder: evaluate, train, save, evaluate again, report."""

    setup: TrainingSetup
    args: Any
    make: Callable[..., FusedTrainer] | None
    notes: list[str]
    questions: list[Question]
    folder: RunFolder
    log: EventLog
    timer: StageTimer
    console: Console
    signals: StopSignals
    resumed: ResumedRun | None
    trainer: FusedTrainer = field(init=False)
    report: Report = field(init=False)
    failed: FailedRun = field(init=False)

    def run(self) -> RunResult:
        self._begin()
        self._build_trainer()
        checkpoint = self._read_checkpoint()
        before = self._evaluate_before()
        self._train(checkpoint)
        if self.signals.received is not None:
            return _stopped(self.trainer, self.setup, self.report, self.folder, self.log, self.signals.received)
        weights = self._save()
        self._evaluate_after(before)
        self.report.next_commands = next_commands(self.setup.config)
        page = write_report(self.folder.path, self.report)
        print_summary(self.report, weights, page, self.console)
        return RunResult(self.folder, self.report, self.trainer.model, self.setup.tokenizer)

    def _begin(self) -> None:
        device = self.setup.device
        self.memory_before = ResourceMeter(device).before
        total = memory_total(device)
        print_text(
            self.console,
            f"{device_name(device)}: {self.memory_before:.2f} of {total:.1f} GiB in use before training",
        )
        for note in self.notes:
            print_text(self.console, note)
        self.setup.data.bad_rows.write_to(self.folder.bad_rows)
        self.folder.write_golden(self.setup.tokenizer)

    def _build_trainer(self) -> None:
        setup, log = self.setup, self.log
        self.progress = ProgressLine(self.console, log)
        self.validation = Validation(setup.config.training, self.folder.best, self.console)
        self.answering = AnswersDuringTraining(setup, self.questions, log, self.progress.console)
        self.last_good = LastGoodWeights()
        callbacks = [log, self.progress, self.answering, self.last_good, *self.validation.callbacks]
        self.trainer = build_trainer(setup, self.args, callbacks, self.signals, self.make)
        add_sample_log(self.trainer, log)
        self.faults = StepFaultLog(log, self.folder.nonfinite, setup.tokenizer, self.progress.progress.console)
        self.trainer.monitor.listeners.append(self.faults)
        setup.model = self.trainer.model  # TRL may have wrapped it
        self.timer.end("trainer")

    def _read_checkpoint(self) -> Path | None:
        """The checkpoint that training continues from, whose weights are read before the evaluations."""
        if self.resumed is None:
            return None
        if self.resumed.checkpoint is not None:
            self.trainer.read_checkpoint(self.resumed.checkpoint)
        self.log.resume_after(self.resumed.step)
        self.faults.resume_after(self.resumed.step)
        if self.resumed.changed:
            self.folder.write_config(self.setup.config)
        return self.resumed.checkpoint

    def _evaluate_before(self) -> Evaluation:
        """Evaluate the base model. An adapter that starts at zero can be switched off later: its base's answers are
        generated after training, so that the first step comes sooner.
        """
        setup, model = self.setup, self.trainer.model
        before = Evaluation(heldout_scores(setup, self.trainer, self.console))
        if (fault := broken_weights(setup)) is not None:
            raise ModelError(f"{setup.config.model.name}: before training, {fault}; the model's weights are damaged")
        self.base_answers_later = is_identity_adapter(model) and base_obstacle(model) is None
        if not self.base_answers_later:
            answer_questions(before, setup, self.questions, self.console)
        self.report = begin_report(setup, self.questions, self.notes)
        self.report.before = before.scores
        write_figures(self.folder.path, self.report)  # from here on `parley report` has something to show
        release_cached_memory(setup.device)
        self.timer.end("evaluation before")
        return before

    def _train(self, checkpoint: Path | None) -> None:
        """Train until the last step, or the one after which a signal stops the run."""
        self.meter = ResourceMeter(self.setup.device)  # resets the peak: that of training is reported
        self.failed = FailedRun(
            self.setup, self.trainer, self.folder, self.log, self.report, self.validation, self.last_good
        )
        try:
            run_training(self.trainer, self.setup, self.folder, self.log, self.progress, checkpoint)
        except NonfiniteStepError as error:
            raise self.failed.stopped_at(error) from None
        self.trainer.remove_callback(self.last_good)
        self.signals.agree()

    def _save(self) -> Path:
        """Choose the weights to keep, and save them unless they are broken."""
        log, report, trainer = self.log, self.report, self.trainer
        log.kept_step, kept_notes = self.validation.finish(trainer)
        trainer.remove_callback(self.answering)
        report.kept_step = log.kept_step if log.kept_step != log.steps_done else None
        self.timer.end("training")
        report.steps = steps_of_events(log.events)
        add_events(report, log.events)
        report.resources = training_resources(trainer, log, self.memory_before, self.meter.seconds())
        report.notes += kept_notes
        if (fault := broken_weights(self.setup)) is not None:
            raise self.failed.diverged(fault)
        weights = self.folder.save_weights(trainer.model, self.setup.tokenizer, full=self.setup.config.lora is None)
        log.write({"event": WEIGHTS, "step": log.steps_done})
        write_figures(self.folder.path, report)
        self.timer.end("saving")
        return weights

    def _evaluate_after(self, before: Evaluation) -> None:
        """Evaluate the trained model, and complete the report."""
        if self.base_answers_later:
            answer_questions(before, self.setup, self.questions, self.console, base=True)
        after = evaluate_model(self.setup, self.trainer, self.questions, self.console)
        self.timer.end("evaluation after")
        add_evaluations(self.report, before, after)
        add_event_notes(self.report, self.log.events)
        resources = self.report.resources
        resources.stages, resources.total_seconds = self.timer.seconds, self.timer.total_seconds
        if after.scores.heldout_loss is not None and not isfinite(after.scores.heldout_loss):
            raise self.failed.diverged("the held-out loss is not finite")


def dry_run(config: RunConfig, console: Console) -> None:
    """Check settings and data of `train`, show mask and number of steps; loads no weights, writes nothing."""
    args, notes = training_arguments(config)
    trainer_maker(config)  # rewards that cannot be loaded are refused
    for note in [*notes, *_without_effect(config, args)]:
        print_text(console, note)
    resolve_adapter(config, console)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    check_tokens(args, tokenizer, "training.")
    data = prepare_data(config, tokenizer, console, keep_tokens=False)
    print_mask(data, tokenizer, console)
    report_questions(config, data.heldout_examples, tokenizer, max_positions(model_config))
    training = config.training
    steps = training.max_steps if data.summary.streaming else planned_steps(training, data.summary.kept)
    rows, thing = rows_per_step(training), "prompt" if training.method == "grpo" else "conversation"
    print_text(console, f"would train {counted(steps, 'step')} of {counted(rows, thing)} into {config.output}")


def demo(output: Path, console: Console | None = None, method: Literal["sft", "dpo", "grpo"] = "sft") -> RunResult:
    """Train the embedded model to talk like a pirate: from answers, or from pairs whose chosen one is a pirate's; or a
    pirate to end with one word, from rewards."""
    return train(RunConfig.create(DEMO_METHODS[method] | {"output": str(output)}), console)


def _new_folder(config: RunConfig) -> RunFolder:
    return RunFolder.create(config) if is_main_process() else ScratchFolder(config.output)


def _open_to_resume(path: Path, config: RunConfig | None, console: Console) -> ResumedRun:
    """As `open_to_resume`, by the main process for all."""
    if is_main_process():
        resumed = open_to_resume(path, config, console)
        from_main((resumed.config, resumed.checkpoint, resumed.changed))
        return resumed
    settings, checkpoint, changed = cast(tuple[RunConfig, Path | None, dict[str, Any]], from_main(None))
    return ResumedRun(ScratchFolder(path), settings, checkpoint, changed)


def training_arguments(config: RunConfig) -> tuple[Any, list[str]]:
    """TRL's arguments, checked, and notes on what was chosen. Raises UsageError or DeviceError."""
    make = sft_config if config.training.method == "sft" else preference_config
    args, notes = make(config, config.output / "checkpoints", pick_device(config.model.device))
    check_settings(config, args)
    return args, notes


def trainer_maker(config: RunConfig) -> Callable[..., FusedTrainer] | None:
    """What makes the trainer of a method that needs more than `build_trainer` knows. Loads reward functions."""
    if config.training.method != "grpo":
        return None
    return partial(GRPOTrainer, reward_funcs=load_rewards(config.training.rewards))


def _without_effect(config: RunConfig, args: Any) -> list[str]:
    return [f"training.{line}" for line in without_effect(args)] if config.training.method == "sft" else []


def _stopped(
    trainer: FusedTrainer, setup: TrainingSetup, report: Report, folder: RunFolder, log: EventLog, signal: Signals
) -> RunResult:
    """The result of a run that a signal ended after a step, once its report says so."""
    report.steps = steps_of_events(log.events)
    add_events(report, log.events)
    report.notes.append(f"stopped by {signal.name} after step {log.steps_done}; to continue: {folder.resume_command}")
    report.next_commands = [folder.resume_command]
    write_report(folder.path, report)
    return RunResult(folder, report, trainer.model, setup.tokenizer, signal)
