"""TRL's trainer over packed rows: documents of a whole optimizer step in as few passes as fit in memory.

Trainer's loop hands over one micro-batch at a time. The documents of a whole optimizer step are collected and trained
on at its last micro-batch, so that its loss is one mean over all its supervised tokens. This is the plain path, through
transformers, PEFT and autograd; `fused_trainer.py` puts the fused step in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from parley.data.packing import (
    DOCUMENTS,
    Document,
    loss_weight,
    padding_free_row,
)
from parley.errors import UsageError
from parley.library_compat.trl import metrics
from parley.training.data_parallel_trainer import summed
from parley.training.packed_evaluation import PackedEvaluation
from parley.training.processes import process_count
from parley.training.rehearsal import rehearse_passes, rehearse_saving, row_lengths
from parley.training.step_checks import StepChecks
from parley.training.step_monitor import StepMonitor, drop_nonfinite, fetch


class PackedTrainer(PackedEvaluation):
    """Put before TRL's SFTTrainer: batches of documents, which other collators' batches pass by.

    A pass that runs out of memory is done again in smaller ones. The update of a step whose loss or gradient is not
    finite is not applied.

    Args:
        nonfinite: "stop" raises NonfiniteStepError at such a step, "skip" continues without it.
        nonfinite_limit: with "skip", more such steps than these raise it, too.

    `supervised_tokens` counts those trained on so far, by all processes.
    """

    def __init__(
        self, *args: Any, nonfinite: Literal["stop", "skip"] = "stop", nonfinite_limit: int = 10, **kwargs: Any
    ) -> None:
        self.monitor = StepMonitor(nonfinite, nonfinite_limit)
        self.supervised_tokens = 0
        self._documents: list[Document] = []  # of the optimizer step whose micro-batches are arriving
        self._rehearsed = False
        self._flops_per_token: float | None = None
        super().__init__(*args, **kwargs)
        # TRL's compute_loss divides by the tokens of the whole step, whether the model's own loss could or not.
        self.model_accepts_loss_kwargs = True
        self.add_callback(StepChecks(self))

    # ---- Data loaders ----

    def get_train_dataloader(self) -> DataLoader:
        """Batches stay on the host, where the fused step reads document lengths; the plain path moves them itself."""
        return self._on_host(super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches stay on the host, as in training. Where metrics want logits, a row is one example."""
        wants_logits = self.compute_metrics is not None and not self.args.prediction_loss_only
        return self._on_host(super().get_eval_dataloader, eval_dataset, padded=wants_logits)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """For `predict`, whose predictions are one row an example."""
        return self._on_host(super().get_test_dataloader, test_dataset, padded=not self.args.prediction_loss_only)

    def _on_host(self, make: Callable[..., DataLoader], *dataset: Any, padded: bool = False) -> DataLoader:
        collator = self.data_collator
        if padded and self.padded_collator is not None:
            self.data_collator = self.padded_collator
        try:
            loader = make(*dataset)
        finally:
            self.data_collator = collator
        loader.device = None
        return loader if padded else self.read_by_all(loader)

    # ---- Training ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step; at the end of a stream empty ones complete the step.

        Trainer would wait for its last micro-batch otherwise: without end, where a stream is shorter than a step.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and DOCUMENTS in batches[0]:
            batches += [{DOCUMENTS: []} for _ in range(num_batches - len(batches))]
        return batches, count

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a whole optimizer step at its last micro-batch; earlier ones are only collected.

        Returns the mean loss over the step's supervised tokens, and 0 for earlier micro-batches: Trainer sums them.
        Batches of other collators go to TRL one by one.
        """
        if DOCUMENTS not in inputs:
            if self.accelerator.sync_gradients:  # num_items_in_batch counts the whole step's at every micro-batch
                self.supervised_tokens += int(num_items_in_batch or 0)
            return self.monitor.add_loss(super().training_step(model, inputs, num_items_in_batch))
        if not self._rehearsed:
            self._rehearsed = True
            if self.wants_rehearsal:
                self.rehearse(model)
        self._documents += inputs[DOCUMENTS]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._check_trainable()
        documents, self._documents = self._documents, []
        supervised = self._supervised_in_step(documents)
        self.supervised_tokens += supervised
        divisor = self._divisor_of_step(documents, supervised)
        return self.monitor.add_loss(self._step_on_documents(model, documents, supervised, divisor), documents)

    # ---- Steps that are not finite ----

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last hook before the update, which is masked here where loss or gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._mask_update(self.monitor.judge(self.state.global_step + 1, norm, loss_alone=self.args.fp16))
        return norm

    def _mask_update(self, finite: torch.Tensor) -> None:
        """Optimizers leave parameters without a gradient, and their state, alone. (fp16's loss scaler does its own.)"""
        if not self.args.fp16 and not bool(finite):
            self.model.zero_grad()

    def check_steps(self) -> None:
        """Read what became of the steps since the last call. Raises NonfiniteStepError."""
        for record in self.monitor.collect():
            self.monitor.react(record)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; figures that are not finite, which JSON cannot hold, are left out of the log history."""
        if self.model.training:
            self.check_steps()
            if "loss" in logs:
                self.monitor.correct_logs(logs)
            # An evaluation between two logged steps leaves those of the steps for the next log.
            fetch(metrics(self, "train"))
            drop_nonfinite(metrics(self, "train"))
            if "learning_rate" in logs:  # a log of steps
                logs["num_supervised_tokens"] = float(self.supervised_tokens)
        super().log(logs, start_time)
        last = self.state.log_history[-1]
        last.update(
            {name: None for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)}
        )

    def _check_trainable(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                "there is nothing to train: every weight of the model is frozen (requires_grad is False); load an "
                "adapter with is_trainable=True, or set requires_grad on what is to be trained"
            )

    def _supervised_in_step(self, documents: Sequence[Document]) -> int:
        """Supervised tokens of the optimizer step, of all processes."""
        return int(self._sum_over_processes(sum(document.supervised_tokens for document in documents)))

    def _divisor_of_step(self, documents: Sequence[Document], supervised: int) -> float:
        """What the summed loss is divided by: the sum of its weights, of all processes, which is at first `supervised`.

        It stays that where no document has weights of its own.
        """
        return self._sum_over_processes(sum(document.loss_weight for document in documents)) or 1.0

    def _sum_over_processes(self, value: float) -> float:
        several = self.args.world_size > 1 and not self.deals_documents  # every process has all that are dealt out
        if several and self.args.average_tokens_across_devices:
            value = self.accelerator.gather(torch.tensor(value, device=self.args.device)).sum().item()
        return value

    def _step_on_documents(
        self, model: torch.nn.Module, documents: Sequence[Document], supervised: int, divisor: float
    ) -> torch.Tensor:
        """Forward and backward through autograd, in as few passes as a micro-batch's tokens allow. Returns the loss.

        `supervised` tokens in the step of all processes; `divisor` of its summed loss.
        """
        loss = self._retry_plain("training", documents, lambda: self._plain_passes(model, documents, divisor))
        if self.deals_documents:
            # Trainer multiplies each loss by the number of processes, for DistributedDataParallel's mean.
            scale = process_count() if self.args.average_tokens_across_devices else 1
            loss = summed(loss) / scale
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.sum_gradients(trained)
            torch._foreach_div_([parameter.grad for parameter in trained if parameter.grad is not None], scale)
        return loss

    @property
    def wants_rehearsal(self) -> bool:
        """On a GPU, where running out of memory is an error to act on; a CPU's process would be ended by the system."""
        return self.args.device.type == "cuda" and self.runs_alone

    def rehearse(self, model: torch.nn.Module) -> None:
        """Before the first step: its largest shapes once, without a trace of them in the run."""
        rehearse_passes(self, model)
        rehearse_saving(self)

    def rehearse_step(self, model: torch.nn.Module, documents: Sequence[Document]) -> None:
        """A step on `documents` without its update, in passes that fit from here on."""
        self._retry_plain("rehearsal", documents, lambda: self._plain_passes(model, documents, loss_weight(documents)))

    @property
    def longest_row(self) -> int:
        """The most tokens that a row may have."""
        return self.max_tokens or self.model.config.max_position_embeddings

    def longest_evaluated(self) -> int:
        """Tokens of the longest row of the evaluation sets; 0 without one."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        lengths = [row_lengths(rows, self.longest_row) for rows in sets.values() if rows is not None]
        return max((int(length_N.max()) for length_N in lengths if len(length_N)), default=0)

    def row_lengths(self) -> NDArray[np.integer]:
        """Tokens of each training row; of a stream, whose rows are not known yet, the most that one may have."""
        return row_lengths(self.train_dataset, self.longest_row)

    # ---- Checkpoints ----

    def _counters(self) -> dict[str, Any]:
        counters = super()._counters()
        drop_nonfinite(counters["metrics"])
        return counters | {"supervised_tokens": self.supervised_tokens, "monitor": self.monitor.counters()}

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        super()._restore_counters(counters)
        self.supervised_tokens = counters["supervised_tokens"]
        self.monitor.restore_counters(counters["monitor"])

    # ---- Figures ----

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As Trainer counts them; the model's parameters are counted once, not at every step."""
        if DOCUMENTS not in inputs:
            return super().floating_point_ops(inputs)
        inputs = self.counted_inputs(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops({"input_ids": torch.empty(1)})
        return int(self._flops_per_token * sum(len(document.ids_L) for document in inputs[DOCUMENTS]))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if DOCUMENTS in inputs:
            documents = self.counted_inputs(inputs)[DOCUMENTS]
            inputs = padding_free_row(documents) if documents else {"input_ids": torch.empty(1, 0, dtype=torch.long)}
        super()._track_num_input_tokens(inputs)
