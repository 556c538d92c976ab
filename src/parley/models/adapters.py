"""LoRA adapters through PEFT: attach, start with LoftQ, load, and count what is trained.

A LoRA layer computes x W^T + s (x A^T) B^T with A (R, D_in), B (D_out, R) and the base weight W frozen
(Hu et al. 2021, arXiv:2106.09685); s is alpha / R, or alpha / sqrt(R) with rsLoRA (arXiv:2312.03732).
Shape legend: R rank, I and O the input and output sizes of a layer.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parley.config import LLAMA_PROJECTIONS, LoraSection, ModelSection, unknown_key
from parley.errors import ModelError, ParleyError, UsageError, one_line
from parley.models.device import seeded
from parley.models.folder import model_folder
from parley.models.quantization import quantization_of

logger = logging.getLogger(__name__)

ADAPTER = "default"  # PEFT's name for a model's only adapter
LINEAR = (torch.nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, torch.nn.Embedding, torch.nn.Conv1d)


def attach_lora(model: PreTrainedModel, section: LoraSection, *, seed: int) -> PeftModel:
    """Freeze `model` and add a trainable adapter in fp32 whose start is decided by `seed` alone.

    Of PEFT's prepare_model_for_kbit_training only the freezing is needed, which get_peft_model does: its copies of
    embeddings, head and norms in fp32 would cost 1 GB at a vocabulary of 128,256, and gradient checkpointing with its
    hook on the inputs is the trainer's.

    Raises UsageError for unknown or contradictory fields, ModelError for target modules that the model lacks.
    """
    config = _lora_config(section)
    config.target_modules = _target_modules(model, section)
    if section.loftq:
        _check_loftq(model, section)
    try:
        with seeded(seed, model.device):
            peft_model = get_peft_model(model, config, revision=vars(model.config).get("_commit_hash"))
            if section.loftq:
                _start_from_loftq(peft_model)
    except ParleyError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"lora: PEFT cannot attach it: {one_line(error)}") from None
    return peft_model


def is_still_base(model: torch.nn.Module) -> bool:
    """Whether `model` has an adapter that changes nothing yet and can be switched off when it does.

    That is where only LoRA matrices are trained, and each B is zero.
    """
    return isinstance(model, PeftModel) and all(
        "lora_A" in name or ("lora_B" in name and not parameter.any())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


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
    """`model` with the PEFT adapter in `folder`, frozen. Raises ModelError where the two do not fit."""
    folder = Path(folder).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: no adapter_config.json; give the folder of a PEFT adapter")
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ModelError(f"{folder}: no adapter_model.safetensors; the adapter was not saved to its end")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
        saved = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged ({one_line(error)}); save it anew") from None
    except (OSError, ValueError, TypeError, RuntimeError, UserWarning) as error:
        raise _misfit(folder, model, one_line(error)) from None
    # PEFT leaves out what the model has no place for without a word.
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    left = sorted(key for key in saved if "lora_" in key and key not in placed)
    if left:
        raise _misfit(folder, model, f"no place for {left[0]} and {len(left) - 1} more")
    return adapted.eval()


def _misfit(folder: Path, model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: the adapter does not fit {model.name_or_path} ({reason}); "
        "load the base named in its adapter_config.json"
    )


def trainable_summary(model: Any) -> str:
    """What is trained, in words: "11.3 M of 1.24 B parameters are trained (0.91%)".

    The whole is the model without its adapter, and 4-bit weights count as what they stand for, two to a byte.
    """
    trained = model.num_parameters(only_trainable=True)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
    whole = model.num_parameters() - added
    return f"{_short(trained)} of {_short(whole)} parameters are trained ({trained / whole:.2%})"


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
    if section.lora_alpha == int(section.lora_alpha):  # PEFT's own type; readers of adapter_config.json expect it
        fields["lora_alpha"] = int(section.lora_alpha)
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except (ValueError, TypeError) as error:
        raise UsageError(f"lora: {one_line(error)}") from None


def _target_modules(model: PreTrainedModel, section: LoraSection) -> list[str] | str:
    """The section's target modules, once each of them is known to match something."""
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    wanted = section.target_modules
    if wanted == "all-linear":
        return wanted
    if isinstance(wanted, str):
        if not any(_matches_pattern(wanted, name) for name in names):
            raise ModelError(f"lora.target_modules {wanted!r} matches no module; {_advice(names)}")
        return wanted
    absent = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent and sorted(wanted) == sorted(LLAMA_PROJECTIONS):
        linear = _linear_leaves(model)
        logger.warning(
            "%s has no %s: the adapter goes on all its linear layers instead (%s)",
            model.name_or_path or type(model).__name__,
            ", ".join(absent),
            ", ".join(linear),
        )
        return linear
    if absent or not wanted:
        raise ModelError(
            f"lora.target_modules {', '.join(absent) or '[]'} matches no module of {type(model).__name__}; "
            f"{_advice(names)}"
        )
    return wanted


def _matches_pattern(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"lora.target_modules {pattern!r}: not a regular expression ({error})") from None


def _linear_leaves(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head]
    return _leaves(layers)


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of module names, without embeddings and head, as target_modules lists them."""
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head", "embed_tokens"})


def _advice(names: Iterable[str]) -> str:
    return f"it has {', '.join(_leaves(names))}; choose of these, or all-linear"


def _check_loftq(model: PreTrainedModel, section: LoraSection) -> None:
    method = quantization_of(model.config)
    if method != "nf4":
        raise UsageError(
            f"lora.loftq makes up for NF4 rounding and the model is {'not quantised' if method == 'none' else method}; "
            "set model.quantization: nf4, or lora.loftq: false"
        )
    if section.model_dump().get("use_dora"):
        raise UsageError("lora.loftq and lora.use_dora both decide how the adapter starts; set one of them to false")


@torch.no_grad()
def _start_from_loftq(model: PeftModel) -> None:
    """Start each adapter from the best rank-R fit to what NF4 rounded away: s B A ~ W - Q.

    LoftQ (Li et al. 2023, arXiv:2310.08659) with the quantised Q left as it is, so that the adapter fits the plain
    checkpoint. PEFT's replace_lora_weights_loftq leaves the scale s out and needs a GPU. W is read in bf16 on the CPU
    from the checkpoint that the model was quantised from; singular values are shared evenly between A and B.

    Raises ModelError where those 16-bit weights cannot be had.
    """
    from bitsandbytes.nn import Linear4bit  # not every machine can load it, and only this needs it

    originals = dict(_unquantised(model.get_base_model()).named_modules())
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), Linear4bit):
            continue
        quantised = layer.get_base_layer()
        weight_OI = originals[path].weight.to(quantised.weight.device, torch.float32)
        missing_OI = (weight_OI - dequantize_module_weight(quantised).float()) / layer.scaling[ADAPTER]
        rank = min(layer.r[ADAPTER], *missing_OI.shape)
        # A few directions more than are kept make the randomised SVD exact enough in the kept ones.
        u_OR, s_R, v_IR = torch.svd_lowrank(missing_OI, q=min(rank + 16, *missing_OI.shape), niter=4)
        root_R = s_R[:rank].sqrt()
        layer.lora_B[ADAPTER].weight[:, :rank] = u_OR[:, :rank] * root_R
        layer.lora_A[ADAPTER].weight[:rank] = (v_IR[:, :rank] * root_R).T


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
