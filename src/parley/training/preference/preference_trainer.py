"""Preference losses on the packed step: both answers of a pair are documents of one row.

A step's documents are collected as in PackedTrainer. Each micro-batch has a loss of its own, as in TRL, and the step's
is their mean. A loss reads one summed log-probability a document, so its derivative is one number a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from parley.data.packing import DOCUMENTS, ORIGIN, Document
from parley.errors import UsageError
from parley.library_compat.trl import count_tokens, metrics, set_signature_columns
from parley.training.log_prob_trainer import LogProbTrainer
from parley.training.preference.documents import PreferenceDocument, slots_of
from parley.training.preference.losses import Figures, Objective
from parley.training.preference.reference import Reference

REFERENCE_ADAPTER = "ref"  # its name in TRL


class PreferenceTrainer(LogProbTrainer):
    """Put before a preference trainer of TRL's. `objective` is the loss; the fused step or the plain path computes it.

    `reference_model`: a model to take reference log-probabilities from; None for the trained one before its first step.
    """

    objective: Objective
    reference: Reference | None = None
    reference_model: torch.nn.Module | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise UsageError("compute_metrics wants logits, which preference losses never build; leave it out")
        self._micro_batches: list[int] = []  # documents of each micro-batch of the step that is arriving
        self._eval_sums: dict[str, list[float]] = {}  # of an evaluation: each figure's sum, and its weight
        self._eval_tokens = 0  # supervised ones of an evaluation
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            raise UsageError(
                f"preference methods train in one process, and here are {self.args.world_size}: start them without "
                "--gpus and torchrun"
            )
        # TRL keeps the reference as a second adapter, which would be saved with the model.
        if isinstance(self.model, PeftModel) and REFERENCE_ADAPTER in self.model.peft_config:
            self.model.delete_adapter(REFERENCE_ADAPTER)
        if self.objective.needs_reference:
            self.reference = Reference(self.model)

    # ---- What FusedTrainer asks ----

    def row_lengths(self) -> NDArray[np.integer]:
        """Tokens of each document."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset):
            return np.array([self.longest_row])
        names = [name for name in rows.column_names if name.endswith("input_ids")]
        chunks = [chunk for name in names for chunk in rows.data.column(name).chunks]
        return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])

    @property
    def rows_per_step(self) -> int:
        """Documents of an optimizer step: each row has two (KTO's have a mismatched one)."""
        return 2 * super().rows_per_step

    def recorded_settings(self) -> dict[str, Any]:
        return super().recorded_settings() | {"objective": repr(self.objective)}

    def _set_signature_columns_if_needed(self) -> None:
        columns = [f"{side}{name}" for side in ("", "chosen_", "rejected_") for name in ("input_ids", "labels")]
        set_signature_columns(self, [*columns, "desirable", ORIGIN])

    # ---- Training ----

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._micro_batches.append(len(inputs[DOCUMENTS]))
        return super().training_step(model, inputs, num_items_in_batch)

    def _step_on_documents(
        self, model: torch.nn.Module, documents: Sequence[Document], supervised: int, divisor: float
    ) -> torch.Tensor:
        sizes, self._micro_batches = [size for size in self._micro_batches if size], []
        assert sum(sizes) == len(documents), "every document is of one micro-batch"
        step = StepLoss(self, preference_documents(documents), sizes)
        self.step_on_sums(model, step)
        for name, value in step.figures.items():
            metrics(self, "train")[name].append(value)
        # As in TRL, which does not count KTO's mismatched documents.
        count_tokens(self, sum(len(document.ids_L) for document in step.documents if document.role != "mismatched"))
        return step.loss

    # ---- Reference ----

    def reference_logps(self, documents: Sequence[PreferenceDocument]) -> Tensor | None:
        """The reference's summed log-probability of each answer, (N,); None for a loss without one."""
        if self.reference is None:
            return None
        return self.reference.logps(documents, self._measure_reference)

    @torch.no_grad()
    def _measure_reference(self, documents: list[PreferenceDocument]) -> Tensor:
        slots = slots_of(documents)
        assert self.reference is not None
        if self.reference_model is not None:
            return self.objective.answers(self.plain_sums(self.reference_model, documents, slots))
        if self.fused_step is not None:  # which has no dropout here
            with self.reference.weights(self.model, self.fused_step.bound.flat.weight_Z.detach()):
                return self.objective.answers(self.policy_sums(documents, slots))
        training = self.model.training
        self.model.eval()  # a reference has no dropout
        try:
            with self.reference.weights(self.model):
                return self.objective.answers(self.policy_sums(documents, slots))
        finally:
            self.model.train(training)

    # ---- Evaluation ----

    def begin_evaluation(self) -> None:
        self._eval_sums = {}
        self._eval_tokens = 0

    def evaluation_figures(self) -> tuple[float, int, dict[str, float]]:
        """As in PackedTrainer; means over the set's rows."""
        means = {name: total / max(weight, 1.0) for name, (total, weight) in self._eval_sums.items()}
        return means.pop("loss", 0.0), self._eval_tokens, means

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        step = StepLoss(self, preference_documents(inputs[DOCUMENTS]), [len(inputs[DOCUMENTS])])
        with torch.no_grad():
            step.evaluate(self.policy_sums(step.documents, step.slots))
        rows = sum(document.role not in ("rejected", "mismatched") for document in step.documents)
        self._eval_tokens += sum(d.answer_tokens for d in step.documents if d.role != "mismatched")
        for name, value in {"loss": step.loss, **step.figures}.items():
            sums = self._eval_sums.setdefault(name, [0.0, 0.0])
            sums[0] += float(value) * rows
            sums[1] += rows
        return step.loss, None, None


class StepLoss:
    """The loss of a step as a function of sums of log-probabilities. `loss` and `figures` are of its last evaluation.

    Args:
        sizes: documents of each micro-batch.
    """

    def __init__(self, trainer: PreferenceTrainer, documents: list[PreferenceDocument], sizes: list[int]) -> None:
        self.objective, self.documents, self.sizes = trainer.objective, documents, sizes
        self.slots = slots_of(documents)
        self.reference = trainer.reference_logps(documents)
        self.loss = torch.zeros(())
        self.figures: Figures = {}

    def evaluate(self, sums: Tensor) -> Tensor:
        answer, prompt = self.objective.answers(sums), sums[len(self.documents) : 2 * len(self.documents)]
        losses, figures, start = [], [], 0
        for size in self.sizes:
            part = slice(start, start + size)
            reference = None if self.reference is None else self.reference[part]
            loss, found = self.objective(self.documents[part], answer[part], prompt[part], reference)
            losses.append(loss)
            figures.append(found)
            start += size
        # A labelled micro-batch may have answers of one kind alone: a figure is a mean over those that have it.
        names = dict.fromkeys(name for found in figures for name in found)
        self.figures = {name: torch.stack([found[name] for found in figures if name in found]).mean() for name in names}
        loss = torch.stack(losses).mean()
        self.loss = loss.detach()
        return loss


def preference_documents(documents: Sequence[Document]) -> list[PreferenceDocument]:
    return [document for document in documents if isinstance(document, PreferenceDocument)]
