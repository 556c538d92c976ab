"""TRL's trainer over packed rows: documents of a whole optimizer step in as few passes as fit in memory.

Trainer's loop hands over one micro-batch at a time. The documents of a whole optimizer step are collected and trained
on at its last micro-batch, so that its loss is one mean over all its supervised tokens. This is the plain path, through
transformers, PEFT and autograd; `fused_trainer.py` puts the fused step in its place.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import (
    DOCUMENTS,
    LOSS_WEIGHTS,
    Document,
    PaddedCollator,
    loss_weight,
    padding_free_row,
    split_by_tokens,
    with_weights,
)
from parley.errors import UsageError
from parley.library_compat.trl import copy_figures, metrics, restore_figures, tokens_seen
from parley.models.packing_isolation import why_not_packed
from parley.training.data_parallel_trainer import DataParallelTrainer, summed
from parley.training.dealing import deal_documents
from parley.training.out_of_memory import (
    EvaluatedRows,
    RandomState,
    Result,
    Stage,
    halved_limit,
    join_rows,
    lengths_of,
    row_count,
    split_rows,
)
from parley.training.processes import process_count, process_rank
from parley.training.rehearsal import rehearse_passes, rehearse_saving, row_lengths
from parley.training.step_checks import StepChecks
from parley.training.step_monitor import StepMonitor, drop_nonfinite, fetch
from parley.training.weighted_loss import WeightedLoss, check_loss_weights

logger = logging.getLogger(__name__)

# Key of a figure in TRL's metrics, to its index in FusedStep.metrics_3.
METRICS = {"mean_token_accuracy": 1, "entropy": 2}


class PackedTrainer(DataParallelTrainer):
    """Put before TRL's SFTTrainer: batches of documents, which other collators' batches pass by.

    A pass that runs out of memory is done again in smaller ones. The update of a step whose loss or gradient is not
    finite is not applied.

    Args:
        nonfinite: "stop" raises NonfiniteStepError at such a step, "skip" goes on.
        nonfinite_limit: with "skip", more such steps than these raise it, too.

    `padded_because` is the reason for padded batches in
    place of packed rows. `supervised_tokens` counts those trained on so far, by all processes.
    """

    data_collator: Any
    max_tokens: int | None = None  # of one document
    compute_loss_func: Callable[..., torch.Tensor] | None
    padded_collator: PaddedCollator | None = None  # of one row a document; None beside a collator of the user's own

    def __init__(
        self, *args: Any, nonfinite: Literal["stop", "skip"] = "stop", nonfinite_limit: int = 10, **kwargs: Any
    ) -> None:
        self.monitor = StepMonitor(nonfinite, nonfinite_limit)
        self.supervised_tokens = 0
        self._documents: list[Document] = []  # of the optimizer step whose micro-batches are arriving
        self._packed_tokens = math.inf  # most tokens of a packed row, once memory ran out
        self._padded_rows = sys.maxsize  # the same for padded batches
        self._eval_parts = 1  # passes into which a batch of an evaluation is split
        self._rehearsed = False
        # Of an evaluation: loss, figures as in FusedStep.metrics_3, supervised tokens, their loss weights.
        self.sums_5 = torch.zeros(5)
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

    def _plain_passes(self, model: torch.nn.Module, documents: Sequence[Document], divisor: float) -> torch.Tensor:
        # TRL's own loss, which a pass without weights takes, divides by no less than 1.
        batches = self._own_batches(with_weights(documents))
        self.current_gradient_accumulation_steps = len(batches)  # TRL averages a router's auxiliary loss over these
        losses = []
        for batch in batches[:-1]:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, divisor))
        losses.append(super().training_step(model, batches[-1], divisor))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, or the weighted one where the batch has loss weights."""
        weights = inputs.pop(LOSS_WEIGHTS, None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.check_loss_weights()
        # Trainer's way to another loss than the model's own.
        self.compute_loss_func = WeightedLoss(weights, self.args.label_smoothing_factor)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.compute_loss_func = None

    def check_loss_weights(self, has_collator: bool = False) -> None:
        """Raises UsageError where an option does not follow loss weights."""
        has_router_loss = vars(self.model.config).get("output_router_logits", False)
        check_loss_weights(self.args, self.compute_loss_func is not None, has_router_loss, has_collator)

    def _own_batches(self, documents: Sequence[Document]) -> list[dict[str, torch.Tensor]]:
        """This process's passes. Every process has as many, as TRL's figures are collective: the rest are empty."""
        if not self.deals_documents:
            return self._plain_batches(documents)
        shares = [self._plain_batches(share) for share in deal_documents(documents, process_count())]
        own = shares[process_rank()]
        return own + [self._empty_batch()] * (max(map(len, shares)) - len(own))

    def _empty_batch(self) -> dict[str, torch.Tensor]:
        """A pass without a supervised token."""
        nothing = Document.from_lists([0, 0], [IGNORE_INDEX] * 2)
        return padding_free_row([nothing]) if self.padded_because is None else self._padded([nothing])

    def _plain_batches(self, documents: Sequence[Document]) -> list[dict[str, torch.Tensor]]:
        """Padding-free rows of at most a micro-batch of longest documents, or padded micro-batches."""
        if self.padded_because is not None:
            size = self._plain_rows
            return [self._padded(documents[start : start + size]) for start in range(0, len(documents), size)]
        return [padding_free_row(documents[run]) for run in split_by_tokens(lengths_of(documents), self.plain_tokens)]

    @property
    def plain_tokens(self) -> float:
        """The most tokens of a packed row."""
        longest = math.inf if self.max_tokens is None else self.args.per_device_train_batch_size * self.max_tokens
        return min(longest, self._packed_tokens)

    @property
    def _plain_rows(self) -> int:
        """The most rows of a padded batch."""
        return min(self.args.per_device_train_batch_size, self._padded_rows)

    def _retry_plain(self, during: Stage, documents: Sequence[Document], attempt: Callable[[], Result]) -> Result:
        random_state, figures = RandomState(self.args.device), copy_figures(self, "train")

        def reduce() -> bool:
            size = self._reduce_plain(documents)
            if size is None:
                return False
            # The step begins anew: dropout, gradients and figures are those of a step that was never begun.
            random_state.restore()
            restore_figures(self, "train", figures)
            self.model.zero_grad()
            self.record_reduction(during, size)
            return True

        return self.retry(attempt, reduce)

    def _reduce_plain(self, documents: Sequence[Document]) -> str | None:
        """Halve the largest pass of `documents`; its new size in words, None where each is one document already."""
        if self.padded_because is not None:
            rows = min(self._plain_rows, len(documents)) // 2
            self._padded_rows = max(rows, 1)
            return f"padded batches of {rows} rows" if rows else None
        tokens = halved_limit(lengths_of(documents), self.plain_tokens)
        if tokens is None:
            return None
        self._packed_tokens = tokens
        return f"rows of at most {tokens:,} tokens"

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

    @cached_property
    def padded_because(self) -> str | None:
        """Why the plain path takes padded batches: documents of one row would not be isolated. None where they are.

        Asked at the first pass of the plain path, as the answer may take a probe of a second.
        """
        config = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        if config is not None and config.is_prompt_learning:
            reason: str | None = "virtual tokens stand before a row, and would before its first document alone"
        elif isinstance(self.model, PeftModel) and self.model.active_peft_config.to_dict().get(
            "alora_invocation_tokens"
        ):
            reason = "an activated LoRA looks for its invocation tokens once a row, not once a document"
        elif self.args.neftune_noise_alpha:
            reason = "NEFTune's noise is scaled by the length of a row"
        else:
            reason = why_not_packed(self.model, self.max_tokens)
        if reason is not None:
            logger.warning("padded batches in place of packed rows: %s", reason)
        return reason

    def _padded(self, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
        assert self.padded_collator is not None, "batches of documents come with Parley's collators"
        return self.padded_collator.pad_documents(documents)

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, and training goes on as if there had been no evaluation: mode and random states are restored."""
        # A data loader takes its base seed from torch's generator, also where it does not shuffle: without this, an
        # evaluation changes every later dropout mask and epoch order.
        training, random_state = self.model.training, RandomState(self.args.device)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            random_state.restore()
            self.model.train(training)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop. Every figure is a mean over the whole set, not a mean of batch means."""
        self.begin_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, supervised, figures = self.evaluation_figures()
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_supervised_tokens"] = supervised
        for name, value in (figures | {"num_tokens": tokens_seen(self)}).items():
            metrics(self, "eval")[name] = [value]
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def begin_evaluation(self) -> None:
        """Forget what `prediction_step` has summed before."""
        self.sums_5 = torch.zeros(5, device=self.args.device, dtype=torch.float64)

    def evaluation_figures(self) -> tuple[float, int, dict[str, float]]:
        """Of what `prediction_step` has summed: loss, supervised tokens, and TRL's figures; means over those tokens."""
        *sums, count, weight = self.accelerator.reduce(self.sums_5, reduction="sum").tolist()
        averages = {name: sums[index] / max(count, 1) for name, index in METRICS.items()}
        return sums[0] / (weight or 1), int(count), averages

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss of a batch, and what `evaluation_loop` sums."""
        figures = copy_figures(self, "eval")

        def reduce() -> bool:
            if self._eval_parts >= row_count(inputs):
                return False
            restore_figures(self, "eval", figures)
            self._eval_parts *= 2
            self.record_reduction("evaluation", f"{self._eval_parts} passes a batch")
            return True

        def attempt() -> list[EvaluatedRows]:
            parts = split_rows(inputs, self._eval_parts)
            return [self._evaluate_rows(model, part, prediction_loss_only, ignore_keys) for part in parts]

        parts = self.retry(attempt, reduce)
        sums_5 = torch.stack([part.sums_5 for part in parts]).sum(0)
        self.sums_5 += sums_5
        logits, labels = (join_rows([vars(part)[name] for part in parts]) for name in ("logits", "labels"))
        return (sums_5[0] / torch.where(sums_5[4] > 0, sums_5[4], 1)).float(), logits, labels

    def _evaluate_rows(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None
    ) -> EvaluatedRows:
        """One pass of the plain path over a batch, or a part of one."""
        batch = inputs
        if DOCUMENTS in inputs:
            documents = self.own_share(inputs[DOCUMENTS])
            if not documents:
                batch = self._empty_batch()
            else:
                batch = padding_free_row(documents) if self.padded_because is None else self._padded(documents)
        weights = batch.get(LOSS_WEIGHTS)
        loss, logits, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        smoothed = self.label_smoother is not None and self.args.loss_type == "nll"
        if self.aux_loss_enabled and self.compute_loss_func is None and not smoothed:
            # TRL's loss has a router's auxiliary loss in it; held-out loss is that of the tokens.
            loss = loss - self.router_aux_loss_coef * metrics(self, "eval")["aux_loss"][-1]
        supervised = batch["labels"][..., 1:] != IGNORE_INDEX
        count = int(supervised.sum())
        weight = float(weights[..., 1:][supervised].sum()) if weights is not None else count
        # TRL appends each batch's means; the set's own are weighted by tokens.
        means = [loss, *(metrics(self, "eval")[name].pop() for name in METRICS), 1.0, 1.0]
        sums_5 = torch.stack([torch.as_tensor(mean).to(self.sums_5) for mean in means])
        if count == 0:  # the mean over nothing is no number
            sums_5.zero_()
        return EvaluatedRows(sums_5 * sums_5.new_tensor([weight, count, count, count, weight]), logits, labels)

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
