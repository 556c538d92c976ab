"""Trainer's saving and resuming, so that a checkpoint is whole and a resumed run is the undisturbed one.

Trainer writes a checkpoint file by file under its final name, pickles its arguments into it, and resumes from the one
with the highest number, whole or not. Here a checkpoint appears in one rename and is verified when it is read
(training/checkpoint.py), and figures that are summed over steps continue (training/resume_state.py).
"""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from parley.errors import RunError, UsageError, one_line
from parley.library_compat.tokenizers import save_tokenizer
from parley.library_compat.transformers import (
    checkpoint_parent,
    loss_since_log,
    push_checkpoint,
    set_loss_since_log,
)
from parley.library_compat.trl import metrics, set_tokens_seen, tokens_seen
from parley.training import checkpoint as files
from parley.training.determinism import deterministic_algorithms, fix_cublas_workspaces
from parley.training.garbage import existing_objects_frozen
from parley.training.processes import from_all
from parley.training.resume_state import (
    ResumeState,
    check_data_unchanged,
    check_settings_unchanged,
    data_fingerprint,
    differences_in_rounding,
    exact_settings,
    this_device,
)
from parley.versions import library_versions

logger = logging.getLogger(__name__)

NEEDED = (files.TRAINER_STATE, files.OPTIMIZER, "scheduler.pt")


class CheckpointingTrainer(Trainer):
    """Put before a Trainer's class.

    Args:
        deterministic: train with torch's deterministic algorithms, so that a GPU gives the same bits from run to run.

    `resumed` is the state of the checkpoint that training continues from; `save_seconds` is what the last one took.
    """

    def __init__(self, *args: Any, deterministic: bool = False, **kwargs: Any) -> None:
        self.deterministic = deterministic
        self.save_seconds = 0.0
        if deterministic:
            fix_cublas_workspaces()
        self.resumed: ResumeState | None = None
        self._counters_pending = False
        self._epoch = self._batches_in_epoch = 0
        self._resumes_from: Path | None = None
        self._writing = False
        self._tokenizer_files: dict[str, bytes] = {}
        self._data: tuple[Any, dict[str, Any]] | None = None  # the training rows, and their fingerprint
        super().__init__(*args, **kwargs)

    # ---- Resuming ----

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in args.output_dir, or a checkpoint's path.

        Raises:
            RunError: the checkpoint is damaged, or none in args.output_dir is whole.
            UsageError, DataError: there is none; or settings or rows are others, so that the run would not be the
                undisturbed one.
        """
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            return self._train(None, *args, **kwargs)
        folder = Path(self.args.output_dir)
        path = newest_checkpoint(folder) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        self.read_checkpoint(path)
        return self._train(str(path), *args, **kwargs)

    @existing_objects_frozen()
    def _train(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        if not self.deterministic:
            return super().train(checkpoint, *args, **kwargs)
        with deterministic_algorithms():
            try:
                return super().train(checkpoint, *args, **kwargs)
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                raise UsageError(f"deterministic: {one_line(error)}; set it to False for this model") from error

    def read_checkpoint(self, path: Path) -> None:
        """Verify a checkpoint and compare its settings and rows with these; `train` then resumes from it.

        Called by `train`; call it earlier to know before an evaluation. Raises as `train` does.
        """
        if self._resumes_from == path:
            return
        self.resumed = None
        check_whole(path)
        if not files.is_foreign(path):
            state = ResumeState.read(path)
            check_settings_unchanged(path, state.settings, self._exact_settings())
            check_data_unchanged(path, state.data, self._data_fingerprint())
            for line in differences_in_rounding(state, self.args.device):
                logger.warning("%s was written with %s: the run continues, but not bit for bit", path.name, line)
            self.resumed = state
        else:
            logger.warning(
                "%s was written by transformers' own Trainer: it has no checksums, settings or counters to compare; "
                "weights, optimizer, schedule and random states are used as they are",
                path,
            )
        if self.args.ignore_data_skip:
            raise UsageError("ignore_data_skip: a resumed run would see its first rows twice; leave it out")
        self._resumes_from, self._counters_pending = path, True

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Epochs done, and batches of the next one. Trainer derives them from the rows of an epoch, which a stream
        does not know: there they are recorded."""
        place = super()._init_training_state(*args, **kwargs)
        if self.resumed is not None and self._counters_pending and not has_length(self.train_dataset):
            return self.resumed.counters["epoch"], self.resumed.counters["batches_in_epoch"]
        return place

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_in_epoch += num_batches if batches else 0
        return batches, count

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Continue the counters before the first step of a resumed run; take none where it is complete already."""
        self._epoch, self._batches_in_epoch = kwargs["epoch"], 0
        if self._counters_pending and self.resumed is not None:
            self._restore_counters(self.resumed.counters)
        self._counters_pending = False
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True  # Trainer would take one step more
            return
        super()._run_epoch(*args, **kwargs)

    # ---- Saving ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it. Raises RunError in one line where that cannot be done."""
        started = perf_counter()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        parent = checkpoint_parent(self, trial)
        target = parent / f"checkpoint-{self.state.global_step}"
        if best_step := self.state.best_global_step:
            best = parent / f"checkpoint-{best_step}"
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        unfinished = files.unfinished_folder(target)
        try:
            self._write_unfinished(unfinished)
            if self.args.should_save:
                files.commit(unfinished, target)
        except files.WRITE_ERRORS as error:
            fault = files.write_fault(error)
            if fault is None or isinstance(error, RunError):
                raise
            raise RunError(f"{target} could not be written: {fault}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            push_checkpoint(self, target)
        if self.args.should_save:
            kept = [target, *([Path(self.state.best_model_checkpoint)] if self.state.best_model_checkpoint else [])]
            files.rotate(parent, self.args.save_total_limit, kept)
        self.save_seconds = perf_counter() - started

    def _write_unfinished(self, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()  # each process writes its random states
        self._writing = True
        try:
            self.save_model(str(folder), _internal_call=True)
        finally:
            self._writing = False
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            self._collect_callback_states()
            self.state.save_to_json(str(folder / files.TRAINER_STATE))
            self._resume_state().write(folder)
            # Written by _save for models of other classes; it is a pickle, which Parley does not read.
            (folder / files.TRAINING_ARGS).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """In a checkpoint: weights and tokenizer, without pickled arguments. Elsewhere as Trainer does."""
        if not self._writing or not isinstance(self.model, PreTrainedModel | PeftModel) or output_dir is None:
            super()._save(output_dir, state_dict)
            return
        self.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            self._write_tokenizer(Path(output_dir))

    def _write_tokenizer(self, folder: Path) -> None:
        """The tokenizer's files, serialised once a run: 17 MB of JSON for Llama 3 take a second."""
        if not isinstance(self.processing_class, PreTrainedTokenizerBase | ProcessorMixin):
            return
        if not self._tokenizer_files:
            before = {path.name for path in folder.iterdir()}
            save_tokenizer(self.processing_class, folder)
            written = [path for path in folder.iterdir() if path.is_file() and path.name not in before]
            self._tokenizer_files = {path.name: path.read_bytes() for path in written}
        for name, content in self._tokenizer_files.items():
            (folder / name).write_bytes(content)

    def _save_rng_state(self, output_dir: str) -> None:
        """The states of Python, NumPy, torch and CUDA as numbers and tensors, which need no unpickling.

        NumPy's key is a list in place of an array, which Trainer's `_load_rng_state` reads as well.
        """
        name, key, *rest = np.random.get_state(legacy=True)
        states = {
            "python": random.getstate(),
            "numpy": (name, np.asarray(key).tolist(), *rest),
            "cpu": torch.random.get_rng_state(),
        }
        several = self.args.world_size > 1
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state_all() if several else torch.cuda.get_rng_state()
        # The main process writes all: the folder may be on its machine alone.
        for rank, each in enumerate(from_all(states) if several else [states]):
            if self.args.should_save:
                torch.save(each, Path(output_dir) / (f"rng_state_{rank}.pth" if several else "rng_state.pth"))

    def _collect_callback_states(self) -> None:
        """Put the states of callbacks into the trainer's, as Trainer does before it writes it."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                states = self.state.stateful_callbacks
                if isinstance(states.get(name), list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()

    # ---- What is recorded ----

    def _resume_state(self) -> ResumeState:
        return ResumeState(
            step=self.state.global_step,
            settings=self._exact_settings(),
            data=self._data_fingerprint(),
            versions=library_versions(),
            device=this_device(self.args.device),
            counters=self._counters(),
            plan=self.recorded_plan(),
        )

    def recorded_plan(self) -> dict[str, Any] | None:
        """The memory plan of a fused step; None without one."""
        return None

    def recorded_settings(self) -> dict[str, Any]:
        """Settings of the trainer itself that decide what a step computes."""
        return {"deterministic": self.deterministic}

    def _exact_settings(self) -> dict[str, Any]:
        return exact_settings(self.args, self.model, **self.recorded_settings())

    def _data_fingerprint(self) -> dict[str, Any]:
        if self._data is None or self._data[0] is not self.train_dataset:
            self._data = (self.train_dataset, data_fingerprint(self.train_dataset))
        return self._data[1]

    def _counters(self) -> dict[str, Any]:
        loss, logged_at = loss_since_log(self)
        return {
            "loss_since_log": loss,
            "logged_at": logged_at,
            "metrics": {name: [float(value) for value in values] for name, values in metrics(self, "train").items()},
            "tokens": tokens_seen(self),
            "epoch": self._epoch,
            "batches_in_epoch": self._batches_in_epoch,
        }

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        set_loss_since_log(self, counters["loss_since_log"], counters["logged_at"])
        metrics(self, "train").clear()
        metrics(self, "train").update({name: list(values) for name, values in counters["metrics"].items()})
        set_tokens_seen(self, counters["tokens"])
        self._batches_in_epoch = counters["batches_in_epoch"]


def newest_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint in `folder`; damaged ones are logged.

    Raises UsageError where there is none, RunError where each is damaged.
    """
    path, damaged = files.newest_whole(folder)
    if path is None and not damaged:
        raise UsageError(f"no checkpoint in {folder}; call train() without resume_from_checkpoint to start")
    if path is None:
        raise RunError(f"{folder}: no checkpoint is whole: {'; '.join(map(str, damaged))}")
    for each in damaged:
        logger.warning("%s: %s is used in its place", each, path.name)
    return path


def check_whole(path: Path) -> None:
    """Raises UsageError where `path` is no checkpoint one can resume from, RunError where it is damaged."""
    if not (path / files.TRAINER_STATE).is_file() and not (path / files.MANIFEST).is_file():
        raise UsageError(f"{path}: no checkpoint there (no {files.TRAINER_STATE})")
    if not files.is_foreign(path) and (reason := files.find_damage(path)):
        other, _ = files.newest_whole(path.parent)
        advice = f"; {other} is whole" if other else ""
        raise RunError(f"{files.Damaged(path, reason)}{advice}")
    if missing := [name for name in NEEDED if not (path / name).is_file()]:
        raise UsageError(
            f"{path}: holds no {missing[0]} (save_only_model?), and without it a run cannot be resumed; start a new "
            "run with its weights as the model"
        )
