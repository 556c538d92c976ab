"""The pipeline behind `parley train`, stage by stage, and `demo`, the same on the embedded model.

rows -> conversations -> tokens + mask -> packed batch -> training step -> adapter -> generate, evaluate, serve
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback
from trl import SFTConfig

from parley.config import DEMO_DATA, DEMO_MODEL, RunConfig
from parley.errors import DeviceError, RunError
from parley.evaluation.evaluation import Evaluation, answer_questions, evaluate_model, heldout_scores
from parley.evaluation.run_report import assemble_report
from parley.models.adapters import is_identity_adapter
from parley.models.device import pick_device
from parley.text import print_text
from parley.training.arguments import sft_config
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.report import Report, Resources, write_report
from parley.training.resources import (
    ResourceMeter,
    StageTimer,
    device_name,
    memory_peak,
    memory_total,
    release_cached_memory,
)
from parley.training.run_folder import RunFolder, is_disk_full
from parley.training.setup import TrainingSetup, prepare_training, print_mask
from parley.training.terminal_summary import print_summary
from parley.training.trainer import SFTTrainer

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

    Raises UsageError, DataError, ModelError, DeviceError or RunError. Ctrl-C and a full disk still save the weights.
    """
    console = console or Console()
    # Settings, device and output folder are checked first: loading a model takes longest.
    RunFolder.check_free(config.output)
    args, notes = sft_config(config, config.output / "checkpoints", pick_device(config.model.device))

    timer = StageTimer()
    setup = prepare_training(config, console, timer)
    print_mask(setup.data, setup.tokenizer, console)

    folder = RunFolder.create(config)
    run = _Run(setup, folder, args, notes, timer, console)
    try:
        return run.evaluate_and_train()
    except (OSError, SafetensorError) as error:
        if isinstance(error, RunError) or not is_disk_full(error):
            raise
        raise folder.rescue_weights(run.trainer.model, setup.tokenizer, run.trainer.state.global_step) from None
    finally:
        run.progress.close()


def demo(output: Path, console: Console | None = None) -> RunResult:
    """Train the embedded model to talk like a pirate."""
    return train(RunConfig.create(DEMO_SETTINGS | {"output": str(output)}), console)


class _Run:
    """One run from its made folder to its report: the trainer with its callbacks, and the stages around training."""

    def __init__(
        self,
        setup: TrainingSetup,
        folder: RunFolder,
        args: SFTConfig,
        notes: list[str],
        timer: StageTimer,
        console: Console,
    ) -> None:
        self.setup, self.folder, self.notes, self.timer, self.console = setup, folder, notes, timer, console
        self.memory_before = ResourceMeter(setup.device).before
        total = memory_total(setup.device)
        print_text(
            console,
            f"{device_name(setup.device)}: {self.memory_before:.2f} of {total:.1f} GiB in use before training",
        )
        for note in notes:
            print_text(console, note)
        self.log = EventLog(folder.events, setup.device)
        self.progress = ProgressLine(console, self.log)
        self.trainer = SFTTrainer(
            model=setup.model,
            args=args,
            train_dataset=setup.data.train,
            eval_dataset=setup.data.heldout,
            processing_class=setup.tokenizer,
            callbacks=[self.log, self.progress],
            engine=setup.config.training.engine,
            memory=setup.config.training.memory,
        )
        self.trainer.remove_callback(PrinterCallback)  # the progress line shows its figures
        timer.end("trainer")

    def evaluate_and_train(self) -> RunResult:
        self.trainer.bind_fused_step()  # held-out loss before training is measured on it too
        before = Evaluation(heldout_scores(self.setup, self.trainer, self.console))
        # An adapter that starts at zero can be switched off later: its base's answers are generated after training,
        # so that the first step comes sooner.
        base_answers_later = is_identity_adapter(self.trainer.model)
        if not base_answers_later:
            answer_questions(before, self.setup, self.trainer, self.console)
        release_cached_memory(self.setup.device)
        self.timer.end("evaluation before")

        meter = ResourceMeter(self.setup.device)
        interrupted = self._train()
        self.timer.end("training")
        resources = self._resources(meter.seconds())
        weights = self.folder.save_weights(
            self.trainer.model, self.setup.tokenizer, full=self.setup.config.lora is None
        )
        self.timer.end("saving")

        if base_answers_later:
            answer_questions(before, self.setup, self.trainer, self.console, base=True)
        after = evaluate_model(self.setup, self.trainer, self.console)
        self.timer.end("evaluation after")
        resources.stages, resources.total_seconds = self.timer.seconds, self.timer.total_seconds

        report = assemble_report(self.setup, before, after, self.log.steps)
        report.resources = resources
        report.notes = self.notes + (
            [f"stopped by hand at step {self.trainer.state.global_step}"] if interrupted else []
        )
        page = write_report(self.folder.path, report)
        print_summary(report, weights, page, self.console)
        return RunResult(self.folder, report, self.trainer.model, self.setup.tokenizer, interrupted)

    def _train(self) -> bool:
        """Train; True when interrupted by Ctrl-C."""
        try:
            self.trainer.train()
        except KeyboardInterrupt:
            return True
        except torch.OutOfMemoryError:
            raise DeviceError(_out_of_memory(self.setup)) from None
        finally:
            self.progress.close()
        return False

    def _resources(self, seconds: float) -> Resources:
        """Of training, which took `seconds`."""
        device, steps = self.setup.device, self.log.steps
        tokens = int(steps[-1]["num_tokens"]) if steps else 0
        return Resources(
            device=device_name(device),
            memory_total_gib=memory_total(device),
            memory_before_gib=self.memory_before,
            memory_peak_gib=memory_peak(device),
            train_seconds=seconds,
            tokens=tokens,
            supervised_tokens=int(self.trainer.supervised_tokens),
            tokens_per_s=tokens / seconds,
        )


def _out_of_memory(setup: TrainingSetup) -> str:
    training = setup.config.training
    return (
        f"out of memory on {device_name(setup.device)} ({memory_total(setup.device):.1f} GiB) with "
        f"{training.per_device_train_batch_size} x up to {setup.config.model.max_seq_length} tokens a batch; lower "
        "training.per_device_train_batch_size or model.max_seq_length, or set model.quantization=nf4"
    )
