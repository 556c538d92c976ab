"""Rehearsal: the largest training, evaluation and saving shapes of a run, once before its first step.

A run that does not fit into memory so fails in its first minute instead of at the step that samples the longest rows.
Nothing of a rehearsal is kept: random states, gradients, figures and the mode of the model are as they were, so that a
run gives the same weights bit for bit with and without it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel

from parley.data.packing import DOCUMENTS, Document, split_by_tokens
from parley.errors import RunError, one_line
from parley.library_compat.trl import copy_figures, restore_figures
from parley.training.optimizer_memory import state_bytes
from parley.training.out_of_memory import RandomState
from parley.training.run_folder import is_disk_full
from parley.units import GIB

if TYPE_CHECKING:
    from parley.training.packed_trainer import PackedTrainer

logger = logging.getLogger(__name__)

REHEARSED_PASSES = 2  # the second one has the gradients of the first beside it, as most passes of a run have
SAVED_WHOLE = GIB  # a larger model is not written to disk twice; its largest tensor is copied to the host instead


def row_lengths(rows: Any, longest: int) -> NDArray[np.integer]:
    """Tokens of each row of a data set; of a stream, whose rows are not known yet, `longest` alone."""
    if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
        chunks = rows.data.column("input_ids").chunks
        return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    return np.array([longest])


def rehearse_passes(trainer: PackedTrainer, model: torch.nn.Module) -> None:
    """Run the largest passes of training and evaluation; `model` as Trainer hands it to a step.

    Passes that do not fit are made smaller as in training. Raises torch.OutOfMemoryError where the largest document
    does not fit by itself.
    """
    with _nothing_kept(trainer), _optimizer_state(trainer):
        trainer.rehearse_step(model, _dummy_documents(largest_passes(trainer), trainer))
        trainer.model.zero_grad()
        sets = trainer.eval_dataset
        for rows in sets.values() if isinstance(sets, dict) else [sets]:
            if rows is not None:
                _rehearse_evaluation(trainer, model, rows)


def largest_passes(trainer: PackedTrainer) -> list[int]:
    """Tokens of the documents of the largest passes that a step of `trainer` may have."""
    lengths = np.sort(trainer.row_lengths())[::-1]
    rows = trainer.rows_per_step
    if len(lengths) < rows and not isinstance(trainer.train_dataset, Dataset):
        lengths = np.repeat(lengths[:1], rows)
    step = [int(length) for length in lengths[:rows]]
    runs = split_by_tokens(step, trainer.plain_tokens)
    return [length for run in runs[:REHEARSED_PASSES] for length in step[run]]


def _rehearse_evaluation(trainer: PackedTrainer, model: torch.nn.Module, rows: Any) -> None:
    count = trainer.args.per_device_eval_batch_size
    lengths = np.sort(row_lengths(rows, trainer.longest_row))[::-1]
    if not isinstance(rows, Dataset):
        lengths = np.repeat(lengths[:1], count)
    documents = _dummy_documents((int(length) for length in lengths[:count]), trainer)
    wants_logits = trainer.compute_metrics is not None and not trainer.args.prediction_loss_only
    batch = {DOCUMENTS: documents}
    if wants_logits and trainer.padded_collator is not None:
        batch = trainer.padded_collator.pad_documents(documents)
    model.eval()
    trainer.prediction_step(model, batch, not wants_logits)


def rehearse_saving(trainer: PackedTrainer) -> None:
    """Save the weights into a temporary folder beside the checkpoints, and see that the disk holds the run's.

    Raises RunError where the disk is full already.
    """
    model = trainer.model
    saved = (
        model.parameters()
        if not isinstance(model, PeftModel)
        else filter(lambda p: p.requires_grad, model.parameters())
    )
    parameters = list(saved)
    size = sum(parameter.nbytes for parameter in parameters)
    folder = Path(trainer.args.output_dir)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if size <= SAVED_WHOLE:
        try:
            with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=existing) as temporary:
                model.save_pretrained(temporary)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise RunError(f"{existing}: {one_line(error)}; free {size / GIB:.2f} GiB for the weights") from None
    else:
        max(parameters, key=lambda parameter: parameter.nbytes).detach().cpu()
    # One more than are kept: a new checkpoint is whole before the oldest is removed.
    checkpoints = 0 if trainer.args.save_strategy == "no" else (trainer.args.save_total_limit or 1) + 1
    needed = size + checkpoints * (size + _state_size(trainer))
    free = shutil.disk_usage(existing).free
    if free < needed:
        logger.warning(
            "%s has %.1f GiB free, and weights and checkpoints of this run take %.1f GiB; free some, or lower "
            "training.save_total_limit",
            existing, free / GIB, needed / GIB,
        )  # fmt: skip


def _dummy_documents(lengths: Iterable[int], trainer: PackedTrainer) -> list[Document]:
    """Documents of these lengths, every token of which is supervised."""
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    rows = [np.arange(length, dtype=np.int32) % vocabulary for length in lengths]
    return [Document(ids_L, ids_L) for ids_L in rows]


@contextmanager
def _nothing_kept(trainer: PackedTrainer) -> Iterator[None]:
    """Restore, at the end, everything that a pass changes."""
    model = trainer.model
    training, random_state = model.training, RandomState(trainer.args.device)
    gradients = {parameter: parameter.grad for parameter in model.parameters() if parameter.requires_grad}
    figures = {mode: copy_figures(trainer, mode) for mode in ("train", "eval")}
    sums_5 = trainer.sums_5.clone()
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for mode, values in figures.items():
            restore_figures(trainer, mode, values)
        trainer.sums_5 = sums_5
        model.train(training)
        random_state.restore()


@contextmanager
def _optimizer_state(trainer: PackedTrainer) -> Iterator[None]:
    """Hold the memory of the optimizer's state, which its first step allocates."""
    size = 0 if trainer.optimizer is None or trainer.optimizer.state else _state_size(trainer)
    held = torch.empty(size, dtype=torch.uint8, device=trainer.args.device)
    try:
        yield
    finally:
        del held


def _state_size(trainer: PackedTrainer) -> int:
    """Bytes of the optimizer's state."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return int(sum(p.numel() * state_bytes(trainer.args.optim, p.element_size()) for p in trained))
