"""bitsandbytes' internals that Parley needs."""

from __future__ import annotations

import logging

from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn

WRAPPED_STATE = Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY
"""Key of a parameter's state, in bitsandbytes' `state_dict()`, below which its moments and scales are.

Private: the class attribute. Without it a saved state could not be read by parameter.
"""
INT8_LOGGER = "bitsandbytes.autograd._functions"


class _OnceFilter(logging.Filter):
    """Passes each message once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


_once = _OnceFilter()


def log_int8_casts_once() -> None:
    """Let bitsandbytes warn once that inputs of 8-bit layers are cast to fp16, not in every layer of every step.

    Private: the name of the logger. bitsandbytes has no setting for this warning. Adding the same filter again has no
    effect.
    """
    logging.getLogger(INT8_LOGGER).addFilter(_once)


def keep_trainable_layout(model: nn.Module) -> int:
    """Keep 4-bit weights of `model` in the layout that backward reads; returns how many had left it.

    On a CPU with AVX512-BF16, Linear4bit.forward in evaluation mode reorders the packed weight in place and rounds its
    scales to bf16, for a product without a gradient of its input: training after it loses gradients without an error.
    Each layer decides by its own attribute, which is cleared here. Weights that were reordered before are put back,
    with scales as they were rounded.

    Private: the attribute and the inverse. Public alternative: none; state_dict() applies the same inverse.
    """
    restored = 0
    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if has_inference_layout(module):
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                module.weight.data, module.weight.quant_state
            )
            restored += 1
    return restored


def has_inference_layout(layer: Linear4bit) -> bool:
    """Whether a Linear4bit's weight was reordered for CPU inference (see keep_trainable_layout)."""
    return bool(vars(layer.weight.quant_state).get("packing_format_for_cpu"))
