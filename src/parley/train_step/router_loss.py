"""The auxiliary loss of a mixture of experts' router, over the tokens of a packed row without its padding.

Switch Transformer (arXiv 2101.03961), equations 4 to 6, as transformers' `load_balancing_loss_func` has it: the number
of experts times the sum over experts of the share of tokens that reach one and its mean probability.

Shape suffixes (legend in docs/design.md): T tokens. Here only: X experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from parley.models.packing_isolation import EXPERTS_PER_TOKEN
from parley.train_step.bind import Unsupported

TOLERANCE = 1e-3  # of the model's own auxiliary loss, relative


def experts_per_token(model: PreTrainedModel) -> int:
    """Raises Unsupported where the configuration does not say it."""
    config = model.config.get_text_config()
    for name in EXPERTS_PER_TOKEN:
        chosen = vars(config).get(config.attribute_map.get(name, name))
        if isinstance(chosen, int):
            return chosen
    raise Unsupported(f"the router's auxiliary loss of {type(model).__name__}")


def router_loss(logits: Sequence[Tensor], chosen: int, filled: Tensor) -> Tensor:
    """Of each layer's router logits (T, X), from which a token's `chosen` experts are taken.

    `filled`: 0-dim, how many of the T tokens are no padding. The shares are constants of the gradient.
    """
    tokens, experts = logits[0].shape
    mask_T1 = (torch.arange(tokens, device=filled.device) < filled).float()[:, None]
    reached_X, probability_X = logits[0].new_zeros(2, experts, dtype=torch.float32).unbind()
    for logits_TX in logits:
        p_TX = functional.softmax(logits_TX, dim=-1)
        index_TK = p_TX.topk(chosen, dim=-1).indices
        reached_X = reached_X.scatter_add(0, index_TK.flatten(), mask_T1.expand_as(index_TK).flatten())
        probability_X = probability_X + (p_TX.float() * mask_T1).sum(0)
    rows = filled * len(logits)
    # No product of matrices, which autocast would round to 16 bits.
    return experts * (reached_X / rows * (probability_X / rows)).sum()


@dataclass
class RouterLoss:
    """A model's auxiliary loss in the passes of a step.

    Args:
        coefficient: of the loss in a step's, which is the mean over its passes.

    `total` is the mean of the last step, 0-dim; `share` is one over the step's passes, on the device, where a graph
    reads it.
    """

    model: PreTrainedModel
    coefficient: float
    checked: bool = False

    def __post_init__(self) -> None:
        self.chosen = experts_per_token(self.model)
        self.total = torch.zeros((), device=self.model.device)
        self.share = torch.ones((), device=self.model.device)

    def begin(self, passes: int) -> None:
        self.total.zero_()
        self.share.fill_(1 / max(passes, 1))

    def of(self, outputs: Any, filled: Tensor, *, padded: bool) -> Tensor:
        """The weighted loss of one pass. Raises Unsupported where the model's own is another."""
        loss = router_loss(outputs.router_logits, self.chosen, filled) * self.share
        if not self.checked and not padded:
            self._check(loss.detach(), outputs.aux_loss.detach())
        self.total += loss.detach()
        return self.coefficient * loss

    def _check(self, loss: Tensor, own: Tensor) -> None:
        """Once, as it waits for the device: the model's own loss knows no padding, and is equal where there is none."""
        got, wanted = float(loss / self.share), float(own)
        if abs(got - wanted) > TOLERANCE * abs(wanted):
            raise Unsupported(f"a router's auxiliary loss of {wanted:.4f} where Switch Transformer's is {got:.4f}")
        self.checked = True
