"""Losses that are functions of log-probabilities, on the packed step: preference losses and policy gradients.

Such a loss reads sums of log-probabilities over slots: one a document for a preference loss, one a token for a policy
gradient. Its derivative by each sum is all that a backward pass needs of it (FusedStep.forward_backward_sums).

Shape suffixes (legend in docs/design.md): S supervised rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document, padding_free_row, split_by_tokens
from parley.errors import UsageError
from parley.library_compat.trl import copy_figures, restore_figures
from parley.train_step.bind import has_lora_dropout
from parley.train_step.slots import Slots
from parley.training.fused_trainer import FusedTrainer, unsupported_training_option
from parley.training.out_of_memory import lengths_of
from parley.training.rehearsal import rehearse_saving

CAPTURED = "the captured path has supervised losses alone"


class LossOfSums(Protocol):
    """The loss of an optimizer step's `documents` as a function of their sums by slot."""

    slots: Slots

    @property
    def documents(self) -> Sequence[Document]: ...

    def evaluate(self, sums: Tensor) -> Tensor:
        """The loss, 0-dim, with its graph. `sums`: as `LogProbTrainer.plain_sums` and `forward_sums` give them."""
        ...


class LogProbTrainer(FusedTrainer):
    """Put before a trainer of TRL's whose loss is a function of log-probabilities."""

    group_size = 2  # documents that padded batches keep together
    aux_loss_enabled: bool  # TRL's: whether the model has an auxiliary loss and it has a weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("engine") == "captured":
            raise UsageError(f"engine: captured is not available: {CAPTURED}; set auto or plain")
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise UsageError(
                "router_aux_loss_coef: the auxiliary loss of a mixture of experts is not computed over packed rows; "
                "set it to 0, or use TRL's own trainer"
            )

    # ---- What FusedTrainer asks ----

    def bind_captured_step(self) -> None:
        self.plain_because = CAPTURED

    def _unsupported_option(self) -> str | None:
        reason = unsupported_training_option(self.args)
        if reason is None and has_lora_dropout(self.model):  # the sums would be of other masks than their gradient
            return "LoRA dropout"
        return reason

    def rehearse(self, model: torch.nn.Module) -> None:
        # A pass that does not fit is split in two while training.
        rehearse_saving(self)

    # ---- Training ----

    def step_on_sums(self, model: torch.nn.Module, loss: LossOfSums) -> None:
        """Forward and backward of an optimizer step, on the fused step or the plain path."""
        if not self.model.training:
            self.model.train()
        fused, figures = self.fused_step, copy_figures(self, "train")

        def gradient(sums: Tensor) -> Tensor:
            restore_figures(self, "train", figures)  # of an attempt that ran out of memory behind its head
            with torch.enable_grad():
                leaf = sums.detach().requires_grad_()
                return torch.autograd.grad(loss.evaluate(leaf), leaf, allow_unused=True, materialize_grads=True)[0]

        if fused is None:
            self._plain_step(model, loss, gradient)
            return
        self._retry_fused(
            "training",
            loss.documents,
            lambda: fused.forward_backward_sums(loss.documents, loss.slots, gradient),
        )
        fused.bound.flat.drop_frozen_gradients()
        fused.bound.flat.expose_gradients()

    def _plain_step(self, model: torch.nn.Module, loss: LossOfSums, gradient: Any) -> None:
        def attempt() -> None:
            runs = self._plain_runs(loss.documents)
            if len(runs) == 1:
                with torch.enable_grad():
                    sums = self.plain_sums(model, loss.documents, loss.slots)
                    self.accelerator.backward(loss.evaluate(sums))
                return
            with torch.no_grad():
                sums = self.plain_sums(model, loss.documents, loss.slots)
            derivative = gradient(sums)
            for run in runs:
                part = Slots(loss.slots.by_document[run], loss.slots.count)
                with torch.enable_grad():
                    sums = self.plain_sums(model, loss.documents[run], part)
                    self.accelerator.backward((sums * derivative).sum())

        self._retry_plain("training", loss.documents, attempt)

    def _plain_runs(self, documents: Sequence[Document]) -> list[slice]:
        if self.padded_because is not None:
            size = max(self.group_size, self._plain_rows)
            return [slice(start, start + size) for start in range(0, len(documents), size)]
        return split_by_tokens(lengths_of(documents), self.plain_tokens)

    def plain_sums(self, model: torch.nn.Module, documents: Sequence[Document], slots: Slots) -> Tensor:
        """Sums of log-probabilities by slot through transformers and autograd, (slots.count,)."""
        sums = torch.zeros(slots.count, device=self.args.device)
        for run in self._plain_runs(documents):
            logits_SV, target_S = self._supervised_logits(model, documents[run])
            logp_S = torch.log_softmax(logits_SV, dim=-1).gather(1, target_S[:, None])[:, 0]
            sums = sums.index_add(0, slots.of(run).to(sums.device), logp_S)
        return sums

    def _supervised_logits(self, model: torch.nn.Module, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
        """The logits that predict each supervised token, in fp32, and those tokens."""
        batch = self.packed_or_padded(documents)
        inputs = {name: value.to(self.args.device) for name, value in batch.items() if name != "labels"}
        with self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits[:, :-1]
        target = batch["labels"][:, 1:].to(logits.device)
        supervised = target != IGNORE_INDEX
        return logits[supervised].float(), target[supervised]

    def packed_or_padded(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """A pass of the plain path."""
        return padding_free_row(documents) if self.padded_because is None else self._padded(documents)

    @torch.no_grad()
    def policy_sums(self, documents: Sequence[Document], slots: Slots) -> Tensor:
        """Sums by slot of the model as it is, without gradients."""
        fused = self.fused_step
        if fused is None:
            return self.plain_sums(self.model, documents, slots)
        return self._retry_fused("evaluation", documents, lambda: fused.forward_sums(documents, slots))
