"""Cross-entropy of supervised rows as a function of autograd, whose gradient overwrites the logits.

Shape suffixes (legend in docs/design.md): S supervised rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parley.data.control_tokens import IGNORE_INDEX
from parley.train_step.device_ops import ops_for
from parley.train_step.ops import LogitTransform


class SupervisedLoss(torch.autograd.Function):
    """`scale` times the summed loss of `logits_SV`, which must not be read afterwards, weighted by `weight_S` if given.

    `dft`: dynamic fine-tuning (arXiv 2508.05629), where a row's weight is the probability of its target, a constant.

    Adds to `metrics_3` as Ops.cross_entropy does. Its gradient is computed in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_SV: Tensor,
        target_S: Tensor,
        scale: Tensor,
        metrics_3: Tensor,
        weight_S: Tensor | None = None,
        dft: bool = False,
    ) -> Tensor:
        before = metrics_3[0].clone()
        gradient_SV = logits_SV.contiguous()
        loss_S = ops_for(logits_SV.device).cross_entropy(gradient_SV, target_S, scale, metrics_3, LogitTransform())
        if dft:
            weight_S = torch.exp(-loss_S)  # 1 for an ignored row, whose loss and gradient are zero
        if weight_S is not None:
            metrics_3[0] = before + loss_S @ weight_S
            gradient_SV *= weight_S[:, None]
        # Autograd raises an error where a module has saved the logits for its own gradient.
        torch.autograd.graph.increment_version(logits_SV)
        ctx.gradient_SV = gradient_SV
        return (metrics_3[0] - before) * scale

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Any, ...]:
        # The loss is the root of the graph: dloss is one.
        return ctx.gradient_SV, None, None, None, None, None


def smoothed_loss(
    logits_SV: Tensor,
    target_S: Tensor,
    scale: Tensor,
    metrics_3: Tensor,
    smoothing: float,
    weight_S: Tensor | None = None,
) -> Tensor:
    """The same with label smoothing (arXiv 1512.00567), in plain PyTorch; `metrics_3` gains the loss with it."""
    loss_S = functional.cross_entropy(
        logits_SV.float(), target_S.long(), ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    total = loss_S.sum() if weight_S is None else loss_S @ weight_S
    unsmoothed_3 = torch.zeros_like(metrics_3)
    ops_for(logits_SV.device).cross_entropy(logits_SV.detach().clone(), target_S, scale, unsmoothed_3, LogitTransform())
    metrics_3[0] += total.detach()
    metrics_3[1:] += unsmoothed_3[1:]
    return total * scale
