"""An optimizer step of GRPO on the packed step: prompts with their completions are documents of one row.

TRL's trainer makes micro-batches of padded prompts and completions, and its loss is a function of the completions'
token log-probabilities. A step's loss here is the sum of TRL's losses of its micro-batches; the slots are the cells of
their padded grids.

Shape suffixes (legend in docs/design.md): B completions of a micro-batch, L tokens of a completion, padded; P tokens of
a prompt, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import ORIGIN, Document
from parley.train_step.slots import Slots

MicroBatch = dict[str, Any]
"""TRL's: prompt_ids and prompt_mask (B, P), completion_ids and completion_mask (B, L), advantages (B,), and more."""


@dataclass
class TokenScores:
    """Log-probability and entropy of each completion token of a micro-batch, (B, L); zero where none is supervised."""

    logps_BL: Tensor
    entropies_BL: Tensor


class PolicyStep:
    """Implements LossOfSums for the micro-batches of an optimizer step.

    Args:
        micro_batch_loss: TRL's loss of a micro-batch from its scores, and whether it is the step's last.
        mean_entropy: of so many tokens, those of the last pass, where sums hold log-probabilities alone.

    `loss` is that of the last evaluation.
    """

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        micro_batch_loss: Callable[[MicroBatch, TokenScores, bool], Tensor],
        mean_entropy: Callable[[int], Tensor],
    ) -> None:
        self.micro_batches, self.micro_batch_loss, self.mean_entropy = micro_batches, micro_batch_loss, mean_entropy
        self.grids: list[torch.Size] = []
        self.documents: list[Document] = []
        by_document: list[NDArray[np.int64]] = []
        start = 0
        for batch in micro_batches:
            shape = batch["completion_ids"].shape
            self.grids.append(shape)
            for document, slot in rows_of(batch, start):
                self.documents.append(document)
                by_document.append(slot)
            start += shape.numel()
        self.slots = Slots(by_document, start)
        self.loss = torch.zeros(())

    @property
    def supervised_tokens(self) -> int:
        return sum(map(len, self.slots.by_document))

    def evaluate(self, sums: Tensor) -> Tensor:
        """`sums`: (slots.count,) of log-probabilities, or (2, slots.count) with the entropies behind them."""
        if sums.dim() == 1:  # the fused step's head sums entropies over a pass
            sums = torch.stack([sums, self.mean_entropy(self.supervised_tokens).to(sums).expand_as(sums)])
        losses, start = [], 0
        for batch, shape in zip(self.micro_batches, self.grids, strict=True):
            logps, entropies = sums[:, start : start + shape.numel()]
            scores = TokenScores(logps.view(shape), entropies.view(shape))
            losses.append(self.micro_batch_loss(batch, scores, batch is self.micro_batches[-1]))
            start += shape.numel()
        loss = torch.stack(losses).sum()
        self.loss = loss.detach()
        return loss


def rows_of(batch: MicroBatch, start: int) -> list[tuple[Document, NDArray[np.int64]]]:
    """A document for each completion with supervised tokens, and the slots of those: cells of the grid from `start` on.

    Of a completion with tool results, the model's own tokens are supervised.
    """
    prompt_BP, completion_BL = (_array(batch[f"{name}_ids"]) for name in ("prompt", "completion"))
    prompt_mask_BP, mask_BL = (_array(batch[f"{name}_mask"]).astype(bool) for name in ("prompt", "completion"))
    supervised_BL = mask_BL if "tool_mask" not in batch else mask_BL & _array(batch["tool_mask"]).astype(bool)
    length = completion_BL.shape[1]
    rows = []
    for row, supervised_L in enumerate(supervised_BL):
        prompt_P = prompt_BP[row][prompt_mask_BP[row]]
        mask_L = mask_BL[row]
        answer_L, answer_mask_L = completion_BL[row][mask_L], supervised_L[mask_L]
        if not answer_mask_L.any():
            continue
        label_L = np.where(answer_mask_L, answer_L, IGNORE_INDEX)
        ids_L = np.concatenate([prompt_P, answer_L]).astype(np.int32)
        labels_L = np.concatenate([np.full(len(prompt_P), IGNORE_INDEX), label_L]).astype(np.int32)
        cell_L = start + row * length + np.flatnonzero(supervised_L)
        origin = batch[ORIGIN][row] if ORIGIN in batch else ""
        rows.append((Document(ids_L, labels_L, origin), cell_L.astype(np.int64)))
    return rows


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
