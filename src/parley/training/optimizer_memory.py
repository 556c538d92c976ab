"""Bytes of optimizer state on the device for each trained weight, by TRL's name of the optimizer."""

from __future__ import annotations

from transformers.training_args import OptimizerNames

# 8-bit states have one fp32 scale for each of their two moments in a block of 256 values (arXiv 2110.02861).
EIGHT_BIT_MOMENT = 1 + 4 / 256
ADAM = 8.0  # two fp32 moments; also the estimate for optimizers that are not named below
BYTES = {
    "adamw_8bit": 2 * EIGHT_BIT_MOMENT,
    "adamw_bnb_8bit": 2 * EIGHT_BIT_MOMENT,
    "ademamix_8bit": 3 * EIGHT_BIT_MOMENT,
    "lion_8bit": EIGHT_BIT_MOMENT,
    "rmsprop_bnb_8bit": EIGHT_BIT_MOMENT,
    "ademamix": 12.0,
    "lion_32bit": 4.0,
    "rmsprop": 4.0,
    "rmsprop_bnb": 4.0,
    "rmsprop_bnb_32bit": 4.0,
    "adagrad": 4.0,
    "sgd": 0.0,
    "adafactor": 0.1,  # one value for each row and column
}


LIKE_WEIGHTS = ("adamw_torch", "adamw_torch_fused")  # two moments of the weights' own type


def state_bytes(optim: OptimizerNames | str, weight_bytes: int = 4) -> float:
    """A paged optimizer's state may move to the host; it is counted as if it were on the device.

    `weight_bytes`: of a trained weight.
    """
    name = str(OptimizerNames(optim).value).removeprefix("paged_")
    return 2.0 * weight_bytes if name in LIKE_WEIGHTS else BYTES.get(name, ADAM)
