"""LoRA adapters through PEFT: attach one, load one, and count what is trained.

A LoRA layer computes x W^T + s (x A^T) B^T with A (R, K), B (N, R) and the base weight W (N, K) frozen
(Hu et al. 2021, arXiv:2106.09685); s is alpha / R, or alpha / sqrt(R) with rsLoRA (arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from parley.config import LoraSection, unknown_key
from parley.errors import ModelError, ParleyError, UsageError, one_line
from parley.models.device import seeded
from parley.models.loftq import check_loftq, init_loftq
from parley.models.lora_targets import target_modules
from parley.models.quantization import quantization_of

logger = logging.getLogger(__name__)

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of init_lora_weights, or their beginnings, with which PEFT changes the base's weights."""
SWITCHED_BY_PEFT = ("lora_", "modules_to_save", "trainable_tokens_")
"""Parts of the names of the weights that PeftModel.disable_adapter switches off."""


def attach_lora(model: PreTrainedModel, section: LoraSection, *, seed: int) -> PeftModel:
    """Freeze `model` and add a trainable adapter in fp32, initialised from `seed` alone.

    PEFT's prepare_model_for_kbit_training is not called: get_peft_model freezes the base by itself, fp32 copies of
    embeddings, head and norms would cost 1 GB at a vocabulary of 128,256, and gradient checkpointing with its hook on
    the inputs is the trainer's.

    Raises UsageError for unknown or contradictory fields, ModelError for target modules that the model lacks.
    """
    config = _lora_config(section)
    config.target_modules = target_modules(model, section)
    if section.loftq:
        check_loftq(model, section)
    try:
        with seeded(seed, model.device):
            peft_model = get_peft_model(model, config, revision=vars(model.config).get("_commit_hash"))
            if section.loftq:
                init_loftq(peft_model)
    except ParleyError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"lora: PEFT cannot attach it: {one_line(error)}") from None
    return peft_model


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
        bias = config.to_dict().get("bias", "none")
        if bias != "none":
            return f"lora.bias: {bias} trained the base's own biases, which stay when the adapter is switched off"
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


def prepare_full(model: PreTrainedModel) -> PreTrainedModel:
    """Make every weight of `model` trainable, for `lora: null`; fp16 weights become fp32.

    The gradient scaler that fp16 training needs refuses gradients in fp16. Raises ModelError for quantised weights.
    """
    method = quantization_of(model.config)
    if method != "none":
        raise ModelError(
            f"lora is null, but the weights are {method} and cannot be trained; set model.quantization: none with a "
            "16-bit checkpoint, or train an adapter"
        )
    if model.dtype == torch.float16:
        model = model.float()
        logger.info("full fine-tuning keeps its weights in fp32, as fp16 weights cannot be trained")
    return model.requires_grad_(True)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """`model` with the PEFT adapter in `folder`, frozen. Raises ModelError where the two do not match."""
    folder = Path(folder).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; give the folder of a PEFT adapter")
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ModelError(f"{folder}: no adapter_model.safetensors; the adapter was not saved completely")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
        saved = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged ({one_line(error)}); save it anew") from None
    except (OSError, ValueError, TypeError, RuntimeError, UserWarning) as error:
        raise _mismatch(folder, model, one_line(error)) from None
    # PEFT drops tensors of modules that the model lacks without a message.
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    dropped = sorted(key for key in saved if "lora_" in key and key not in loaded)
    if dropped:
        raise _mismatch(folder, model, f"no module for {dropped[0]} and {len(dropped) - 1} more")
    return adapted.eval()


def _mismatch(folder: Path, model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: the adapter does not fit {model.name_or_path} ({reason}); "
        "load the base named in its adapter_config.json"
    )


def trainable_summary(model: Any) -> str:
    """How much is trained, in one line: "11.3 M of 1.24 B parameters are trained (0.91%)".

    The total is that of the model without its adapter. Packed 4-bit weights count as two parameters a byte.
    """
    trained = model.num_parameters(only_trainable=True)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
    total = model.num_parameters() - added
    return f"{_short(trained)} of {_short(total)} parameters are trained ({trained / total:.2%})"


def _short(count: int) -> str:
    for unit, name in [(1e9, "B"), (1e6, "M"), (1e3, "k")]:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def _lora_config(section: LoraSection) -> LoraConfig:
    fields = section.model_dump(exclude={"loftq"})
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in fields:
        if key not in known:
            raise unknown_key(f"lora.{key}", known | {"loftq"}, "the run's settings")
    if section.lora_alpha == int(section.lora_alpha):  # PEFT declares an int; readers of the file expect one
        fields["lora_alpha"] = int(section.lora_alpha)
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except (ValueError, TypeError) as error:
        raise UsageError(f"lora: {one_line(error)}") from None
