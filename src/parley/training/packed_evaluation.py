"""Evaluation over packed rows: every figure is a mean over the supervised tokens of the whole set."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import (
    DOCUMENTS,
    LOSS_WEIGHTS,
    padding_free_row,
)
from parley.library_compat.trl import copy_figures, metrics, restore_figures, tokens_seen
from parley.training.out_of_memory import (
    EvaluatedRows,
    RandomState,
    join_rows,
    row_count,
    split_rows,
)
from parley.training.packed_passes import PackedPasses
from parley.training.plain_router_loss import without_router_loss

# Key of a figure in TRL's metrics, to its index in FusedStep.metrics_3.
METRICS = {"mean_token_accuracy": 1, "entropy": 2}


class PackedEvaluation(PackedPasses):
    """Put before TRL's SFTTrainer: evaluation of documents, which leaves training as if there had been none."""

    _eval_parts = 1  # passes into which a batch of an evaluation is split

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Of an evaluation: loss, figures as in FusedStep.metrics_3, supervised tokens, their loss weights.
        self.sums_5 = torch.zeros(5)
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, and training continues as if there had been no evaluation: mode and random states are restored."""
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
        with without_router_loss(self):  # held-out loss is that of the tokens
            loss, logits, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        supervised = batch["labels"][..., 1:] != IGNORE_INDEX
        count = int(supervised.sum())
        weight = float(weights[..., 1:][supervised].sum()) if weights is not None else count
        # TRL appends each batch's means; the set's own are weighted by tokens.
        means = [loss, *(metrics(self, "eval")[name].pop() for name in METRICS), 1.0, 1.0]
        sums_5 = torch.stack([torch.as_tensor(mean).to(self.sums_5) for mean in means])
        if count == 0:  # the mean over nothing is no number
            sums_5.zero_()
        return EvaluatedRows(sums_5 * sums_5.new_tensor([weight, count, count, count, weight]), logits, labels)
