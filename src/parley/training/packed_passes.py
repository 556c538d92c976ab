"""A step's rows in passes of the plain path that fit: packed rows, or padded batches where rows cannot be packed.

A pass that runs out of memory is done again in smaller ones.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import (
    LOSS_WEIGHTS,
    Document,
    PaddedCollator,
    padding_free_row,
    split_by_tokens,
    with_weights,
)
from parley.library_compat.trl import copy_figures, restore_figures
from parley.models.packing_isolation import why_not_packed
from parley.training.data_parallel_trainer import DataParallelTrainer
from parley.training.dealing import deal_documents
from parley.training.out_of_memory import (
    RandomState,
    Result,
    Stage,
    halved_limit,
    lengths_of,
)
from parley.training.plain_router_loss import leave_out_impossible_router_loss
from parley.training.processes import process_count, process_rank
from parley.training.weighted_loss import WeightedLoss, check_loss_weights

logger = logging.getLogger(__name__)


class PackedPasses(DataParallelTrainer):
    """Put before TRL's SFTTrainer: passes over documents through transformers, PEFT and autograd.

    `padded_because` is the reason for padded batches in place of packed rows.
    """

    data_collator: Any
    max_tokens: int | None = None  # of one document
    compute_loss_func: Callable[..., torch.Tensor] | None
    padded_collator: PaddedCollator | None = None  # of one row a document; None beside a collator of the user's own
    _packed_tokens: float = math.inf  # most tokens of a packed row, once memory ran out
    _padded_rows: int = sys.maxsize  # the same for padded batches

    def _plain_passes(self, model: torch.nn.Module, documents: Sequence[Document], divisor: float) -> torch.Tensor:
        leave_out_impossible_router_loss(self)
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

    @cached_property
    def padded_because(self) -> str | None:
        """Why the plain path takes padded batches: documents of one row would not be isolated. None where they are.

        Asked at the first pass of the plain path, as the answer may take a probe of a second.
        """
        config = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        if config is not None and config.is_prompt_learning:
            reason: str | None = "virtual tokens precede a row, and not each of its documents"
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
