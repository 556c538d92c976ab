"""Load a causal language model and its tokenizer: 16 or 32 bits, 8 bits, NF4, or as the checkpoint was quantised."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from parley.config import DEMO_MODEL, ModelSection
from parley.errors import DeviceError, ModelError, one_line
from parley.library_compat.bitsandbytes import keep_trainable_layout
from parley.models.adapters import load_adapter, merge_adapter
from parley.models.config_fields import check_config, check_index
from parley.models.device import DTYPES, describe_device, pick_device, pick_dtype
from parley.models.quantization import check_quantised, plan_quantization, quantization_of
from parley.models.resolve import adapter_chain, local_folder, model_folder
from parley.models.tokenizer import (
    fit_vocabulary,
    has_tokenizer,
    load_tokenizer,
    read_tokenizer,
    require_chat_template,
)
from parley.units import GIB

__all__ = ["load_adapter", "load_model", "load_tokenizer", "require_chat_template"]

logger = logging.getLogger(__name__)

# What transformers raises for fields that it does not check before it computes with them.
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
WEIGHT_FILES = ["*.safetensors", "*.bin"]
CHAT_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def load_model(section: ModelSection) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that `section` describes, in evaluation mode on their device.

    `section.name` is a hub id, a folder, the embedded demo, or the folder of a PEFT adapter, whose base is loaded
    first; `section.adapter` says whether the adapter stays one ("auto", "continue"), is merged ("merge") or is left
    out ("new"). NF4 is QLoRA's 4-bit type (Dettmers et al. 2023, arXiv:2305.14314), int8 is LLM.int8()
    (arXiv:2208.07339), both through bitsandbytes; a checkpoint that was saved quantised is loaded as saved.

    Raises ModelError for a model that is missing, damaged or does not fit, DeviceError for a device that is.
    """
    adapters, base = adapter_chain(section)
    model, tokenizer = _load_base(base)
    for adapter in adapters:
        top = adapter is adapters[-1]
        if top and section.adapter == "new":
            break
        folder = model_folder(adapter)
        if has_tokenizer(folder):
            tokenizer = read_tokenizer(folder, adapter)
            tokenizer = fit_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, adapter)
        model = load_adapter(model, folder)
        if not top or section.adapter == "merge":
            model = merge_adapter(model, adapter.name if local_folder(adapter.name) is None else str(folder))
            logger.info("%s is merged into %s", adapter.name, base.name)
    return model, tokenizer


def _load_base(section: ModelSection) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A whole model, and its tokenizer, as load_model describes them."""
    device = pick_device(section.device)
    dtype = pick_dtype(section.dtype, device)
    folder = model_folder(section, weights=False)
    config = read_config(folder, section)
    # Before the weights, which may be a download of many GiB: a missing tokenizer is refused first.
    tokenizer = read_tokenizer(folder, section)
    quantization = plan_quantization(config, section, dtype)
    folder = model_folder(section)
    model = _read_weights(folder, section, config, quantization, device, dtype)
    keep_trainable_layout(model)
    tokenizer = fit_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, section)
    set_padding(model, tokenizer)
    set_name(model, section, folder)
    return model.eval(), tokenizer


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The config of the model that `section` describes, of an adapter's base, without weights. Raises ModelError."""
    _, base = adapter_chain(section)
    return read_config(model_folder(base, weights=False), base)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The context length in tokens; None where the model sets no limit."""
    return config.get_text_config().to_dict().get("max_position_embeddings")


def read_config(folder: Path, section: ModelSection) -> PreTrainedConfig:
    name = section.name
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: {folder} has no config.json; give the folder that save_pretrained wrote")
    if not section.trust_remote_code:  # a model with code of its own gives fields its own meaning
        check_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=section.trust_remote_code)
    except (*MALFORMED, OSError, StrictDataclassError) as error:
        raise ModelError(f"{name}: config.json cannot be used: {one_line(error)}") from None
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise ModelError(f"{name}: config.json has a text_config, which {config.model_type} models do not have")
    config.return_dict = True  # a checkpoint may ask for tuples, and every caller reads named outputs
    heads = config.architectures or []
    own_code = "AutoModelForCausalLM" in vars(config).get("auto_map", {})
    if (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code) or (
        heads and not own_code and not any(head.endswith(CHAT_HEADS) for head in heads)
    ):
        raise ModelError(
            f"{name}: got {' '.join(heads) or type(config).__name__}, wanted a causal language model "
            "(LlamaForCausalLM and the like); choose a chat model"
        )
    positions = max_positions(config)
    if positions is not None and section.max_seq_length > positions:
        raise ModelError(
            f"{name}: model.max_seq_length is {section.max_seq_length} and the model has {positions} positions; "
            f"set model.max_seq_length: {positions} or less"
        )
    return config


def _read_weights(
    folder: Path,
    section: ModelSection,
    config: PreTrainedConfig,
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    name = section.name
    files = [file for pattern in WEIGHT_FILES for file in folder.glob(pattern)]
    if not files:
        raise ModelError(f"{name}: {folder} has no weights (*.safetensors or *.bin); copy them there")
    check_index(folder)
    extra = {} if quantization is None else {"quantization_config": quantization}
    try:
        with _quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                local_files_only=True,
                trust_remote_code=section.trust_remote_code,
                ignore_mismatched_sizes=True,  # they are in `report`, and _check_complete refuses them
                output_loading_info=True,
                **extra,
            )
    except torch.OutOfMemoryError:
        raise DeviceError(_out_of_memory(section, files, device)) from None
    except ImportError as error:
        saved = quantization_of(config)
        instead = (
            "set model.quantization: none" if saved == "none" else f"give the checkpoint that {saved} was made from"
        )
        raise ModelError(
            f"{name}: needs a library that cannot be used here ({one_line(error)}); see `parley doctor`, or {instead}"
        ) from None
    except pickle.UnpicklingError:  # its text advises to execute the file
        raise ModelError(
            f"{name}: a .bin file in {folder} is damaged, or holds more than tensors, which is never executed; "
            "get the weights as .safetensors"
        ) from None
    except (SafetensorError, EOFError) as error:
        raise ModelError(f"{name}: weights in {folder} are damaged ({one_line(error)}); download them again") from None
    except (*MALFORMED, OSError, StrictDataclassError) as error:
        raise ModelError(f"{name}: cannot be loaded: {one_line(error)}") from None
    _check_complete(name, report)
    check_quantised(name, model)
    check_finite(name, model)
    return model


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint with missing weights, which transformers only warns about and initialises at random."""
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for what, keys in [
        ("lacks", sorted(report["missing_keys"])),
        ("has the wrong shape for", sorted(mismatched)),
    ]:
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"{name}: the checkpoint {what} {keys[0]}{more}, as config.json describes the model; "
                "fetch weights and config.json of the same model"
            )
    unused = sorted(report["unexpected_keys"])
    if unused:
        logger.warning(
            "%s: %d weights are not part of the model and are ignored (%s ...)", name, len(unused), unused[0]
        )


@torch.no_grad()
def check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse weights with NaN or infinity, which answer the same token for ever; one sum a tensor, one wait in all.

    Raises ModelError, which names the first such tensor.
    """
    weights = {key: value for key, value in model.named_parameters() if value.dtype in DTYPES.values()}
    if not weights:
        return
    # A sum is NaN or infinite if one value is; fp32 holds the sum of any number of finite fp16 values that fit a GPU.
    sums = torch.stack([value.sum(dtype=torch.float32) for value in weights.values()])
    if not sums.isfinite().all():
        broken = [key for key, total in zip(weights, sums.tolist(), strict=True) if not isfinite(total)]
        more = f" and {len(broken) - 1} more weights hold" if len(broken) > 1 else " holds"
        raise ModelError(
            f"{name}: {broken[0]}{more} NaN or infinity, not numbers; "
            "download them again, or train again with a lower learning rate"
        )


def _out_of_memory(section: ModelSection, files: list[Path], device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    size = sum(file.stat().st_size for file in files)
    advice = (
        "set model.quantization: nf4 (about a quarter of 16-bit weights)"
        if section.quantization != "nf4"
        else "choose a smaller model"
    )
    return (
        f"{section.name}: {size / GIB:.1f} GiB of weight files do not fit into {describe_device(device)}, "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free; end other programs that use the GPU, or {advice}"
    )


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def set_name(model: PreTrainedModel, section: ModelSection, folder: Path) -> None:
    """Set the name that adapters record as their base: a folder, or a hub id and commit, never the cache folder."""
    from_hub = section.name != DEMO_MODEL and local_folder(section.name) is None
    model.name_or_path = model.config._name_or_path = section.name if from_hub else str(folder)
    model.config._commit_hash = folder.name if from_hub else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading report of several lines; _check_complete says what matters in one."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
