"""Adapters whose initialisation takes a part of the base's weights: PiSSA, OLoRA, CorDA, LoRA-GA.

They start with W = W_res + s B0 A0 and leave W_res in the base (PiSSA: Meng et al. 2024, arXiv:2404.02948; OLoRA:
Buyukakyuz 2024, arXiv:2406.01775). What is trained is W_res + s B A, so B and A alone mean nothing to a reader that has
the plain base W. The difference is a plain adapter of twice the rank,

    s (B A - B0 A0) = s [B, -B0] [A; A0],

which PEFT documents as `path_initial_model_for_weight_conversion`. PEFT's own conversion is not used: it reads the
initial adapter from a folder that would have to be kept, and drops modules_to_save.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from parley.errors import UsageError
from parley.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from parley.models.quantization import quantization_of

ROWS = ("lora_A", "lora_embedding_A")  # (R, K): the rank is the first dimension
COLUMNS = ("lora_B", "lora_embedding_B")  # (N, R)
RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga")


def is_residual_init(config: LoraConfig) -> bool:
    """Whether PEFT changes the base's weights when it attaches an adapter with `config`."""
    return str(config.init_lora_weights).lower().startswith(RESIDUAL_INITS)


class ResidualInitModel(PeftModelForCausalLM):
    """A PeftModel that is saved as a plain LoRA adapter of twice the rank, which any reader puts on the plain base.

    Saved checkpoints can be loaded back into it to continue training. Raises UsageError for quantised bases, whose
    residual is rounded, and for rsLoRA with patterns, where one alpha cannot keep the scale of every layer.
    """

    def __init__(self, model: PreTrainedModel, peft_config: LoraConfig, **options: Any) -> None:
        init = peft_config.init_lora_weights
        method = quantization_of(model.config)
        if method != "none":
            raise UsageError(
                f"lora.init_lora_weights: {init} changes the base's weights and they are {method}; set "
                "model.quantization: none, or lora.init_lora_weights: true"
            )
        if peft_config.use_rslora and (peft_config.rank_pattern or peft_config.alpha_pattern):
            raise UsageError(
                f"lora.init_lora_weights: {init} with use_rslora allows neither rank_pattern nor alpha_pattern; leave "
                "one of them out"
            )
        if peft_config.use_dora:
            raise UsageError(f"lora.use_dora and lora.init_lora_weights: {init} exclude each other; leave one out")
        super().__init__(model, peft_config, **options)
        matrices = get_peft_model_state_dict(self, save_embedding_layers=False)
        self.initial = {name: value.detach().cpu().clone() for name, value in matrices.items() if ".lora_" in name}

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        *,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the difference to the base as it was before this adapter (see the module)."""
        if not safe_serialization:
            raise UsageError("save_pretrained: an adapter is saved as safetensors alone; leave safe_serialization out")
        super().save_pretrained(str(save_directory), is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        weights = {name: self._joined(name, value) for name, value in load_file(folder / WEIGHTS_FILE).items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        path = folder / CONFIG_FILE
        fields = doubled(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")

    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load what save_pretrained wrote: of each pair of stacked matrices, the half that was trained."""
        if adapter_name not in self.peft_config:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        halves = {name: _trained_half(name, value) for name, value in load_file(Path(model_id) / WEIGHTS_FILE).items()}
        return set_peft_model_state_dict(self, halves, adapter_name=adapter_name)

    def _joined(self, name: str, value: Tensor) -> Tensor:
        if _has_part(name, ROWS):
            return torch.cat([value, self.initial[name].to(value.dtype)], dim=0)
        if _has_part(name, COLUMNS):
            return torch.cat([value, -self.initial[name].to(value.dtype)], dim=1)
        return value


def doubled(fields: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of the joined adapter: twice the rank at the same scale."""
    growth = 2**0.5 if fields["use_rslora"] else 2  # s is alpha / sqrt(R) with rsLoRA, else alpha / R
    return {
        **fields,
        "init_lora_weights": True,
        "r": 2 * fields["r"],
        "lora_alpha": growth * fields["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in (fields["rank_pattern"] or {}).items()},
        "alpha_pattern": {name: 2 * alpha for name, alpha in (fields["alpha_pattern"] or {}).items()},
    }


def _trained_half(name: str, value: Tensor) -> Tensor:
    if _has_part(name, ROWS):
        return value[: value.shape[0] // 2]
    return value[:, : value.shape[1] // 2] if _has_part(name, COLUMNS) else value


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name.split(".") for part in parts)
