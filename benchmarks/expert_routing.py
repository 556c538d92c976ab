"""Which experts tokens reach in a pass: recorded, and given to another pass, to compare both with equal routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Modules whose result is (logits, weights, indices) of the chosen experts, as transformers writes them."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


class Routing:
    """Chosen experts of each layer's tokens, (T, K) in ascending order, as the model's routers run.

    `columns_T`: where the tokens that are compared stand in the rows of a pass (a padded batch has others, too).
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = routers_of(model)

    @contextmanager
    def recorded(self, columns_T: Tensor, given: Sequence[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """The list is filled by one pass. `given` are the experts that tokens reach instead of the router's choice."""
        chosen: list[Tensor] = []

        def record(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            logits_TX, weight_TK, index_TK = output
            if given is not None:
                index_TK = index_TK.index_copy(0, columns_T, given[len(chosen)])
                # Both families weigh the chosen experts by a softmax over their logits.
                weight_TK = logits_TX.gather(1, index_TK).softmax(-1, dtype=torch.float32).to(weight_TK.dtype)
            chosen.append(index_TK[columns_T].sort(-1).values)
            return logits_TX, weight_TK, index_TK

        hooks = [router.register_forward_hook(record) for router in self.routers]
        try:
            yield chosen
        finally:
            for hook in hooks:
                hook.remove()


def routed_elsewhere(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    """By layer, the share of tokens that reach another set of experts."""
    return [round(float((a != b).any(-1).float().mean()), 4) for a, b in zip(ours, theirs, strict=True)]
