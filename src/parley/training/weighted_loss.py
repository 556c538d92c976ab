"""The loss of tokens with weights on the plain path: sum(weight x cross-entropy) / sum(weight).

Shape suffixes (legend in docs/design.md): B rows, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import SFTConfig

from parley.data.control_tokens import IGNORE_INDEX
from parley.errors import UsageError


@dataclass(frozen=True)
class WeightedLoss:
    """A loss function for Trainer's `compute_loss_func`. `weight_BL` are the loss weights of the batch's tokens."""

    weight_BL: Tensor
    smoothing: float = 0.0

    def __call__(self, outputs: Any, label_BL: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The weighted sum divided by `num_items_in_batch`, the weights of the whole step; by this batch's without."""
        logits_BLV, target_BL = outputs.logits[:, :-1], label_BL[:, 1:]
        loss_BL = functional.cross_entropy(
            logits_BLV.float().transpose(1, 2),
            target_BL,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            label_smoothing=self.smoothing,
        )
        weight_BL = self.weight_BL[:, 1:].to(loss_BL) * (target_BL != IGNORE_INDEX)
        total = (loss_BL * weight_BL).sum()
        if num_items_in_batch is not None:
            return total / torch.as_tensor(num_items_in_batch, device=total.device)
        weight = weight_BL.sum()
        return total / torch.where(weight > 0, weight, 1.0)


def check_loss_weights(args: SFTConfig, has_loss_function: bool, has_router_loss: bool, has_collator: bool) -> None:
    """Raises UsageError for an option that does not follow the loss weights of the data."""
    for found, option in (
        (has_loss_function, "compute_loss_func"),
        (args.loss_type != "nll", f"loss_type={args.loss_type}"),
        (has_router_loss, "the router's auxiliary loss"),
        (has_collator, "a data_collator of its own"),
    ):
        if found:
            raise UsageError(
                f"the data has loss weights between 0 and 1, which {option} does not follow; leave out one of the two"
            )
