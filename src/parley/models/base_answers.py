"""Whether a model's base can answer beside its adapter, unchanged.

PEFT switches an adapter off by leaving out what it adds. That gives the base as it was before training only where
nothing else was changed: no initialisation that moved weights, no merged adapter, no base weights trained too.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from parley.errors import ModelError
from parley.models.residual_init import RESIDUAL_INITS

BASE_CHANGING_INITS = (*RESIDUAL_INITS, "loftq")
"""Values of init_lora_weights, or their beginnings, with which PEFT changes the base's weights."""
SWITCHED_BY_PEFT = ("lora_", "modules_to_save", "trainable_tokens_")
"""Parts of the names of the weights that PeftModel.disable_adapter switches off."""


def is_identity_adapter(model: torch.nn.Module) -> bool:
    """Whether `model` has an adapter that changes nothing yet, and that training leaves possible to switch off.

    That holds where only LoRA matrices are trained and each B is zero.
    """
    return isinstance(model, PeftModel) and all(
        "lora_A" in name or ("lora_B" in name and not parameter.any())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def base_obstacle(model: torch.nn.Module) -> str | None:
    """Why switching off the adapter of `model` would not give its untouched base; None where it does.

    Every caller that answers with the base (chat, generate, serve, evaluate, report) asks here first.
    """
    if not isinstance(model, PeftModel):
        return "this model has no adapter, so there is no base to switch to; open a run trained with LoRA"
    for config in model.peft_config.values():
        init = str(config.to_dict().get("init_lora_weights")).lower()
        if init.startswith(BASE_CHANGING_INITS):
            return f"lora.init_lora_weights: {init} moved a part of the base's weights into the adapter"
        if config.to_dict().get("layer_replication"):
            return "lora.layer_replication repeats layers of the base"
        bias = config.to_dict().get("bias", "none")
        if bias != "none":
            return f"lora.bias: {bias} trained the base's own biases, which stay when the adapter is switched off"
    # Unmerging subtracts what was added, and rounding keeps the base from being what it was.
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        return "the adapter is merged into the base's weights"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in SWITCHED_BY_PEFT):
            return f"weights of the base are trained too ({name})"
    return None


def require_base(model: torch.nn.Module) -> None:
    """Raises ModelError, with the reason, where the base of `model` cannot answer."""
    reason = base_obstacle(model)
    if reason is not None:
        remedy = "" if not isinstance(model, PeftModel) else "; to ask the base, open it by its own name"
        raise ModelError(f"the base model cannot answer: {reason}{remedy}")
