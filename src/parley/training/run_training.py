"""The trainer of a run: building it, and training with it so that no fault loses what was trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from parley.errors import DeviceError, ParleyError, RunError, UsageError
from parley.models.sharded_nf4 import local_tensor
from parley.models.sharding import is_sharded
from parley.train_step.captured_step import base_of
from parley.training.callbacks import EventLog, ProgressLine
from parley.training.check_settings import REFUSALS, setting_error
from parley.training.checkpoint import write_fault
from parley.training.fused_trainer import FusedTrainer
from parley.training.last_good_weights import trained_parameters
from parley.training.preference.arguments import objective_of
from parley.training.preference.trainers import DPOTrainer, KTOTrainer
from parley.training.prepare_training import TrainingSetup
from parley.training.processes import from_all
from parley.training.report import Resources
from parley.training.resource_usage import device_name, memory_peak, memory_total
from parley.training.run_folder import RunFolder
from parley.training.save_cadence import SaveCadence
from parley.training.signals import StopCallback, StopSignals
from parley.training.trainer import SFTTrainer

LOGIT_TOKENS = 64  # of the first row: logits of a whole row of a large vocabulary may not fit


def build_trainer(
    setup: TrainingSetup,
    args: Any,
    callbacks: list[Any],
    signals: StopSignals,
    make: Callable[..., FusedTrainer] | None = None,
) -> FusedTrainer:
    """The trainer of training.method, or what `make` makes. Raises UsageError for settings that TRL's refuses."""
    make = make or _trainer_class(setup.config.training.method, args)
    try:
        trainer = make(
            model=setup.model,
            args=args,
            train_dataset=_in_order(setup),
            eval_dataset=setup.data.heldout,
            processing_class=setup.tokenizer,
            callbacks=callbacks,
            engine=setup.config.training.engine,
            memory=setup.config.training.memory,
            nonfinite=setup.config.training.nonfinite,
            nonfinite_limit=setup.config.training.nonfinite_limit,
            deterministic=setup.config.training.deterministic,
            **(_several_processes(setup) if setup.config.training.method == "sft" else {}),
        )
    except ParleyError:
        raise
    except REFUSALS as error:
        raise setting_error("", error) from error
    if setup.config.training.save_steps == "auto" and not args.load_best_model_at_end:
        trainer.add_callback(SaveCadence(trainer))
    trainer.add_callback(StopCallback(signals))  # after those that decide whether to save
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UsageError(
            "FSDP and DeepSpeed: `parley train` does not shard models yet, each process holds a whole one; leave their "
            "settings out (parley.SFTTrainer takes them, as TRL does)"
        )
    trainer.remove_callback(PrinterCallback)  # the progress line shows its figures
    for callback in trainer.callback_handler.callbacks:
        # It would be chosen when training begins; the evaluation before would write to ./runs, and so would later ones.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(args.output_dir).parent / "tensorboard")
    return trainer


def _several_processes(setup: TrainingSetup) -> dict[str, Any]:
    return {"scale_batch": False, "context_parallel": setup.context_parallel}


def _in_order(setup: TrainingSetup) -> Any:
    """The training rows. KTO's trainer takes them as they come, so that they are shuffled here."""
    rows, training = setup.data.train, setup.config.training
    return rows.shuffle(seed=training.seed) if training.method == "kto" else rows


def _trainer_class(method: str, args: Any) -> Callable[..., FusedTrainer]:
    match method:
        case "sft":
            return SFTTrainer
        case "kto":
            return KTOTrainer
    return partial(DPOTrainer, objective=objective_of(method, args))


def run_training(
    trainer: FusedTrainer,
    setup: TrainingSetup,
    folder: RunFolder,
    log: EventLog,
    progress: ProgressLine,
    checkpoint: Path | None,
) -> None:
    """Train, from `checkpoint` on where there is one.

    Raises UsageError for settings that are refused before the first step, DeviceError out of memory, RunError where
    the disk fails, which says from where training can continue.
    """
    resumed_from = trainer.args.resume_from_checkpoint if checkpoint is None else str(checkpoint)
    try:
        trainer.train(resume_from_checkpoint=resumed_from)
    except torch.OutOfMemoryError:
        raise DeviceError(_out_of_memory(setup)) from None
    except (ParleyError, SafetensorError, *REFUSALS) as error:
        cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ is not None else error
        if write_fault(cause) is not None and log.steps_done > 0:
            raise folder.write_error(cause, trainer.model, setup.tokenizer, log.steps_done) from None
        if isinstance(error, ParleyError):
            raise
        if not log.begun:  # nothing ran yet but the trainer's own set-up from its settings
            raise setting_error("", error) from error
        raise
    finally:
        progress.close()


def training_resources(trainer: FusedTrainer, log: EventLog, memory_before: float, seconds: float) -> Resources:
    """Of training, which took `seconds` in this process; `memory_before` (GiB) was measured before it."""
    seconds += log.seconds_before
    device = trainer.args.device
    tokens = int(log.steps[-1]["num_tokens"]) if log.steps else 0
    return Resources(
        device=device_name(device),
        memory_total_gib=memory_total(device),
        memory_before_gib=memory_before,
        memory_peak_gib=memory_peak(device),
        train_seconds=seconds,
        tokens=tokens,
        supervised_tokens=int(trainer.supervised_tokens),
        tokens_per_s=tokens / (seconds - log.paused),
    )


def broken_weights(setup: TrainingSetup) -> str | None:
    """What is wrong with the model's numbers, None where its trained weights and its logits are finite."""
    trained = trained_parameters(setup.model)
    broken = [name for name, parameter in trained.items() if not bool(local_tensor(parameter).isfinite().all())]
    if is_sharded(setup.model):  # each process has looked at its own part
        broken = sorted({name for names in from_all(broken) for name in names})
    if broken:
        return f"{len(broken)} trained tensors are not finite ({broken[0]})"
    ids_1T = torch.tensor([setup.data.preview[0].input_ids[:LOGIT_TOKENS]], device=setup.model.device)
    was_training = setup.model.training
    setup.model.eval()
    # PEFT's own forward calls the base's without hooks, which gather the weights of a sharded one.
    model = base_of(setup.model) if is_sharded(setup.model) else setup.model
    with torch.no_grad():
        largest_1T = model(input_ids=ids_1T).logits.amax(-1)  # -inf alone may mask words that are padding
    setup.model.train(was_training)
    return None if bool(largest_1T.isfinite().all()) else "the logits of the first row are not finite"


def _out_of_memory(setup: TrainingSetup) -> str:
    training = setup.config.training
    return (
        f"out of memory on {device_name(setup.device)} ({memory_total(setup.device):.1f} GiB) with "
        f"{training.per_device_train_batch_size} x up to {setup.config.model.max_seq_length} tokens a batch; lower "
        "training.per_device_train_batch_size or model.max_seq_length, or set model.quantization=nf4"
    )
