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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from parley.config import LoraSection
from parley.config_keys import unknown_key
from parley.errors import ModelError, ParleyError, UsageError, one_line
from parley.models.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFields,
    is_plain_pattern,
    lora_config,
    missing_package,
    read_adapter_fields,
    read_adapter_weights,
)
from parley.models.device import seeded
from parley.models.loftq import ADAPTER, check_loftq, init_loftq
from parley.models.lora_options import check_fields, check_modules
from parley.models.lora_targets import target_modules
from parley.models.patterns import matching
from parley.models.quantization import quantization_of
from parley.models.residual_init import ResidualInitModel, is_residual_init
from parley.units import short_count

logger = logging.getLogger(__name__)

# Fields of LoraConfig that say what an adapter is or belongs to. With inference_mode nothing would be trained.
DECIDED_BY_RUN = {"inference_mode", "peft_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}

NEEDS_DATA = ("eva", "corda", "lora_ga")
"""Values of init_lora_weights that PEFT computes from data in calls of its own, before or after it attaches."""
MOST_RANKS = 16  # times the hidden size


def attach_lora(model: PreTrainedModel, section: LoraSection, *, seed: int) -> PeftModel:
    """Freeze `model` and add a trainable adapter in fp32, initialised from `seed` alone.

    PEFT's prepare_model_for_kbit_training is not called: get_peft_model freezes the base by itself, fp32 copies of
    embeddings, head and norms would cost 1 GB at a vocabulary of 128,256, and gradient checkpointing with its hook on
    the inputs is the trainer's.

    Raises UsageError for unknown or contradictory fields, ModelError for target modules that the model lacks.
    """
    if isinstance(model, PeftModel):
        raise UsageError(
            "lora: the model has an adapter already; train on with it, merge it first (model.merge_and_unload()), or "
            "load its base"
        )
    section = _with_own_loftq(section)
    config = _lora_config(section)
    config.target_modules = target_modules(model, section)
    check_modules(model, config)
    if isinstance(config.exclude_modules, str):
        names = [name for name, _ in model.named_modules()]
        config.exclude_modules = matching(config.exclude_modules, names, "lora.exclude_modules")
    _check_ranks(model, config)
    if section.loftq:
        check_loftq(model, section)
    try:
        with seeded(seed, model.device):
            peft_model = create_peft_model(model, config)
            if section.loftq:
                init_loftq(peft_model)
    except ParleyError:
        raise
    except ImportError as error:
        raise UsageError(f"lora: {missing_package(error)}") from None
    except (ValueError, TypeError, NotImplementedError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(f"lora: PEFT cannot attach it: {one_line(error)}") from None
    return peft_model


def _with_own_loftq(section: LoraSection) -> LoraSection:
    """`section` with PEFT's spelling of LoftQ, which needs scipy and leaves the scale out, read as lora.loftq."""
    if section.model_dump().get("init_lora_weights") != "loftq":
        return section
    logger.info("lora.init_lora_weights: loftq is read as lora.loftq: true")
    return section.model_copy(update={"init_lora_weights": True, "loftq": True})


def _check_ranks(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuse ranks that only cost memory: one over the size of a matrix adds nothing to what it can express."""
    limit = MOST_RANKS * model.config.get_text_config().hidden_size
    for name, rank in {"r": config.r, **(config.rank_pattern or {})}.items():
        if rank > limit:
            raise UsageError(f"lora.{name} is {rank:,}; with this model a rank over {limit:,} only costs memory")


def continue_adapter(model: PeftModel, section: LoraSection) -> None:
    """Check that training may continue the adapter of `model`: none of the settings given contradicts it.

    Raises UsageError for a setting that the adapter cannot follow.
    """
    adapter = model.active_peft_config.to_dict()
    for name in sorted(section.model_fields_set):
        wanted, found = getattr(section, name), adapter.get(name)
        if isinstance(wanted, list):
            wanted, found = sorted(wanted), sorted(found or [])
        if name == "target_modules" and isinstance(wanted, str):
            continue  # saved as the list of the modules it matched
        if wanted != found and (wanted or found):
            raise UsageError(
                f"lora.{name} is {wanted!r} and the adapter that training continues has {found!r}; leave it out, or "
                "set model.adapter: merge or new"
            )


def prepare_full(model: PreTrainedModel) -> PreTrainedModel:
    """Make every weight of `model` trainable, for `lora: null`; fp16 weights become fp32.

    The gradient scaler that fp16 training needs refuses gradients in fp16. Raises ModelError for quantised weights.
    """
    if isinstance(model, PeftModel):
        raise UsageError(
            "lora is null, but the model has an adapter, which would be saved without the trained base; set "
            "model.adapter: merge, or keep lora"
        )
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
    """`model` with the LoRA adapter in `folder`, trainable as PEFT's `requires_grad` says, in evaluation mode.

    Only tensors of the adapter are read: LoRA matrices, and what adapter_config.json names beside them (bias,
    modules_to_save, trainable tokens). A file that holds other tensors, such as weights of the base, is refused unless
    these equal the base's own. Raises ModelError where files and model do not fit.
    """
    folder = Path(folder).expanduser()
    if isinstance(model, PeftModel):
        raise UsageError(f"{folder}: the model has an adapter already; load its base, or merge the adapter first")
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder}: no {CONFIG_FILE}; give the folder of a PEFT adapter")
    fields = read_adapter_fields(folder)
    weights = read_adapter_weights(folder, fields)
    fields.target_modules = _present_modules(model, fields.target_modules, "target_modules")
    fields.exclude_modules = _present_modules(model, fields.exclude_modules, "exclude_modules")
    # Where the base is now: a name relative to the folder it was read from would be wrong where it is saved next.
    fields.base_model_name_or_path = model.name_or_path
    if str(fields.init_lora_weights).startswith("pissa_niter_"):
        raise ModelError(
            f"{folder}: initialised by {fields.init_lora_weights}, at random, and saved without that start; save it "
            "again with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT: what matters is checked below, and raised
            adapted = create_peft_model(model, lora_config(fields))
            missing, unexpected = _set_weights(adapted, folder, weights)
    except ParleyError:
        raise
    except KeyError as error:  # a module of modules_to_save that the file does not hold
        raise _mismatch(folder, model, f"lacks {error.args[0]}") from None
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
        raise _mismatch(folder, model, one_line(error)) from None
    for keys, what in [(missing, "lacks"), (unexpected, "no module for")]:
        if keys:
            raise _mismatch(folder, model, f"{what} {keys[0]} and {len(keys) - 1} more")
    return adapted.eval()


def merge_adapter(model: PeftModel, name: str) -> PreTrainedModel:
    """The base of `model` with its adapter added to the weights; adapters trained on it record `name` as their base.

    Raises ModelError for quantised weights, which would be rounded again, and for an adapter that is not finite.
    """
    method = quantization_of(model.get_base_model().config)
    if method != "none":
        raise ModelError(
            f"{name}: the adapter cannot be merged into {method} weights without rounding them again; set "
            "model.quantization: none with a 16-bit base"
        )
    # merge_and_unload also puts modules_to_save in place of the originals.
    merged = model.merge_and_unload()
    merged.name_or_path = merged.config._name_or_path = name
    merged.config._commit_hash = None
    return merged


def _present_modules(model: PreTrainedModel, wanted: list[str] | str | None, field: str) -> list[str] | str | None:
    """A pattern of module names as the list of the modules of `model` that it matches."""
    if not isinstance(wanted, str) or wanted == "all-linear":
        return wanted
    try:
        return matching(wanted, [name for name, _ in model.named_modules()], field)
    except UsageError as error:
        raise ModelError(str(error)) from None


def _set_weights(adapted: PeftModel, folder: Path, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Write `weights` into the adapter; the names that were missing, and those that found no module."""
    entitled = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    own = adapted.state_dict()
    ours = {}
    for name, value in weights.items():
        if name in entitled or ".lora_" in name:
            ours[name] = value
        elif name not in own or not torch.equal(own[name].cpu(), value.to(own[name].dtype)):
            raise ModelError(
                f"{folder}: {WEIGHTS_FILE} holds {one_line(name, 120)}, which {CONFIG_FILE} does not entitle it to; "
                "an adapter may not replace weights of its base: name the module in modules_to_save and save it again, "
                "or merge the adapter with the program that made it"
            )
    result = set_peft_model_state_dict(adapted, ours)
    # Names in the model hold that of the adapter; a tied copy of trainable tokens is no tensor of the file.
    missing = [name for name in result.missing_keys if name.replace(f".{ADAPTER}", "") in entitled]
    return missing, list(result.unexpected_keys)


def _mismatch(folder: Path, model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"{folder}: the adapter does not fit {model.name_or_path} ({reason}); "
        "load the base named in its adapter_config.json"
    )


def create_peft_model(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """PEFT's get_peft_model, but for adapters whose initialisation changes the base: these are saved as plain ones."""
    if is_residual_init(config):
        config.base_model_name_or_path = model.name_or_path or None
        config.revision = vars(model.config).get("_commit_hash")
        return ResidualInitModel(model, config)
    return get_peft_model(model, config, revision=vars(model.config).get("_commit_hash"))


def trainable_summary(model: Any) -> str:
    """How much is trained, in one line: "11.3 M of 1.24 B parameters are trained (0.91%)".

    The total is that of the model without its adapter. Packed 4-bit weights count as two parameters a byte.
    """
    trained = model.num_parameters(only_trainable=True)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "modules_to_save" in name)
    total = model.num_parameters() - added + _packed_beyond_bytes(model)
    return f"{short_count(trained)} of {short_count(total)} parameters are trained ({trained / total:.2%})"


def _packed_beyond_bytes(model: Any) -> int:
    """What the bytes of sharded NF4 weights (models/sharded_nf4.py) count too few, and their scales too many."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    scales = sum(size for name, size in sizes.items() if name.endswith(".absmax"))
    return sum(size for name, size in sizes.items() if name.endswith(".packed")) - scales


def check_lora(section: LoraSection) -> None:
    """Raises UsageError for a section that is wrong whatever the model, before one is loaded."""
    _lora_config(_with_own_loftq(section))


def _lora_config(section: LoraSection) -> LoraConfig:
    fields = section.model_dump(exclude={"loftq"})
    if str(fields.get("init_lora_weights")).lower().startswith(NEEDS_DATA):
        raise UsageError(
            f"lora.init_lora_weights: {fields['init_lora_weights']} is computed from data, which is not offered; "
            "choose pissa, olora, orthogonal, gaussian or true"
        )
    check_fields(fields)
    for name in (*(fields.get("rank_pattern") or {}), *(fields.get("alpha_pattern") or {})):
        if not is_plain_pattern(str(name)):
            raise UsageError(f"lora: {one_line(str(name), 60)!r} is no plain pattern of module names; write them out")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in fields:
        if key not in known:
            raise unknown_key(f"lora.{key}", known | {"loftq"}, "the run's settings")
        if key in DECIDED_BY_RUN:
            raise UsageError(f"lora.{key} is decided by the run; leave it out")
    if section.lora_alpha == int(section.lora_alpha):  # PEFT declares an int; readers of the file expect one
        fields["lora_alpha"] = int(section.lora_alpha)
    try:
        AdapterFields.model_validate({**fields, "lora_alpha": float(section.lora_alpha)})
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:1]))
        raise UsageError(f"lora.{where}: got {one_line(repr(first['input']), 120)}; {first['msg']}") from None
    except ImportError as error:
        raise UsageError(f"lora: {missing_package(error)}") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"lora: {one_line(error)}") from None
