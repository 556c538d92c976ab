"""Mixtures of experts whose launches do not depend on the routing, through transformers' experts interface.

transformers' eager experts ask the device which of them a token reached, which a CUDA graph cannot contain; its grouped
products (torch.nn.functional.grouped_mm) read the boundaries between experts on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

EAGER, GROUPED = "eager", "grouped_mm"


def runs_experts_one_by_one(model: PreTrainedModel) -> bool:
    """Whether `model` has experts that run one by one and could run as grouped products."""
    if EAGER not in model.get_experts_implementation().values():
        return False
    try:
        return model.get_correct_experts_implementation(GROUPED) == GROUPED
    except ValueError:  # what transformers raises for a model without experts of its interface
        return False


@contextmanager
def using_grouped_experts(model: PreTrainedModel) -> Iterator[None]:
    """`model` computes its experts as grouped products; afterwards as before."""
    own = model.get_experts_implementation()
    model.set_experts_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_experts_implementation(own)
