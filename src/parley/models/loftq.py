"""LoftQ: start a LoRA adapter from what NF4 rounded away (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, PreTrainedModel

from parley.config import LoraSection, ModelSection
from parley.errors import ModelError, UsageError
from parley.models.quantization import quantization_of
from parley.models.resolve import model_folder

ADAPTER = "default"  # the name PEFT gives to a model's only adapter
OVERSAMPLING = 16  # directions computed beyond the rank; they make the randomised SVD exact enough in the kept ones


def check_loftq(model: PreTrainedModel, section: LoraSection) -> None:
    """Raises UsageError where `model` has no NF4 rounding to make up for, or DoRA is asked for as well."""
    method = quantization_of(model.config)
    if method != "nf4":
        raise UsageError(
            f"lora.loftq makes up for NF4 rounding and the model is {'not quantised' if method == 'none' else method}; "
            "set model.quantization: nf4, or lora.loftq: false"
        )
    if section.model_dump().get("use_dora"):
        raise UsageError("lora.loftq and lora.use_dora both initialise the adapter; set one of them to false")


@torch.no_grad()
def init_loftq(model: PeftModel) -> None:
    """Set each adapter to the best rank-R fit of the rounding error: s B A ~ W - Q.

    The quantised Q (N, K) is left as it is, so that the adapter fits the plain checkpoint. PEFT's
    replace_lora_weights_loftq is not used: it leaves the scale s out and needs a GPU. W is read in bf16 on the CPU from
    the checkpoint that the model was quantised from. Singular values are split evenly between A (R, K) and B (N, R).

    Raises ModelError where those 16-bit weights cannot be had.
    """
    from bitsandbytes.nn import Linear4bit  # imported late: it loads native code that only this function needs

    originals = dict(_unquantised(model.get_base_model()).named_modules())
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), Linear4bit):
            continue
        quantised = layer.get_base_layer()
        weight_NK = originals[path].weight.to(quantised.weight.device, torch.float32)
        residual_NK = (weight_NK - dequantize_module_weight(quantised).float()) / layer.scaling[ADAPTER]
        rank = min(layer.r[ADAPTER], *residual_NK.shape)
        directions = min(rank + OVERSAMPLING, *residual_NK.shape)
        u_NR, s_R, v_KR = torch.svd_lowrank(residual_NK, q=directions, niter=4)
        root_R = s_R[:rank].sqrt()
        layer.lora_B[ADAPTER].weight[:, :rank] = u_NR[:, :rank] * root_R
        layer.lora_A[ADAPTER].weight[:rank] = (v_KR[:, :rank] * root_R).T


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """The 16-bit model, on the CPU, that `model` was quantised from while loading."""
    source = ModelSection(name=model.name_or_path, revision=vars(model.config).get("_commit_hash"))
    original = AutoModelForCausalLM.from_pretrained(
        model_folder(source), dtype=torch.bfloat16, device_map={"": "cpu"}, local_files_only=True
    )
    method = quantization_of(original.config)
    if method != "none":
        raise ModelError(
            f"lora.loftq needs 16-bit weights, and {source.name} was saved as {method}; name the checkpoint it was "
            "made from with model.quantization: nf4, or set lora.loftq: false"
        )
    return original
