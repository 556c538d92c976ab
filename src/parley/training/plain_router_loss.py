"""The auxiliary loss of a mixture of experts' router on the plain path, where TRL computes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from parley.errors import UsageError

logger = logging.getLogger(__name__)


@contextmanager
def without_router_loss(trainer: Any) -> Iterator[None]:
    """Passes without it. TRL reads from an SFTTrainer and from the model's configuration whether there is one."""
    enabled, config = trainer.aux_loss_enabled, trainer.model.config.get_text_config()
    if enabled:
        trainer.aux_loss_enabled = config.output_router_logits = False
    try:
        yield
    finally:
        if enabled:
            trainer.aux_loss_enabled = config.output_router_logits = True


def leave_out_impossible_router_loss(trainer: Any) -> None:
    """Switch it off, in one line, for families whose number of experts TRL does not find.

    Raises UsageError where it was asked for by its coefficient.
    """
    config = trainer.model.config.get_text_config()
    if not trainer.aux_loss_enabled or "num_experts" in {*vars(config), *config.attribute_map}:
        return
    lacking = f"TRL computes no auxiliary loss of a router for the {config.model_type} family"
    if trainer.args.router_aux_loss_coef:
        raise UsageError(f"training.router_aux_loss_coef: {lacking}; set it to 0")
    logger.warning("%s: training goes without it", lacking)
    trainer.aux_loss_enabled = config.output_router_logits = False
