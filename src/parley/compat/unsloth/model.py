"""`FastLanguageModel` as notebooks call it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from parley.compat.unsloth.options import check_options
from parley.compat.unsloth.tokenizer import as_notebooks_expect
from parley.config import LLAMA_PROJECTIONS, LoraSection, ModelSection, RunConfig
from parley.data.render import pin_date
from parley.errors import UsageError
from parley.models.adapters import attach_lora, prepare_full
from parley.models.device import pick_device, pick_dtype
from parley.models.load import load_model

logger = logging.getLogger(__name__)

LOADING_NO_MEANING = [
    "disable_log_stats",
    "device_map_planner_kwargs",
    "fast_inference",
    "float8_kv_cache",
    "gpu_memory_utilization",
    "max_lora_rank",
    "offload_embedding",
    "random_state",
    "unsloth_tiled_mlp",
    "use_exact_model_name",
]
LOADING_NOT_OFFERED = {
    "load_in_fp8": "use load_in_4bit or load_in_8bit",
    "qat_scheme": "leave it out",
    "text_only": "load a model without a vision part",
}
ADAPTER_NO_MEANING = ["max_seq_length", "temporary_location", "offload_layers", "checkpoint_skip_layers"]
ADAPTER_NOT_OFFERED = {
    "finetune_last_n_layers": "list the layers in layers_to_transform",
    "qat_scheme": "leave it out",
}


def is_bfloat16_supported() -> bool:
    """Whether the GPU has bf16 in hardware; False without a GPU."""
    return pick_dtype("auto", pick_device()) == torch.bfloat16


is_bf16_supported = is_bfloat16_supported


class FastLanguageModel:
    """Loading, adapters and modes of a model. What comes back is transformers' model, or PEFT's around it."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int = 2048,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: str | dict[str, Any] = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> tuple[PreTrainedModel | PeftModel, Any]:
        """The model and its tokenizer: a hub id or a folder, an adapter's too.

        `load_in_4bit` means NF4 with double quantisation, on a CPU as well; without any of the `load_in_` options the
        checkpoint is taken as it was saved. `dtype` None is bf16 where the GPU has it, else fp16, and fp32 on a CPU.
        `fix_tokenizer` and `use_gradient_checkpointing` decide nothing here.

        Raises UsageError for options that contradict each other or are not offered, ModelError for a model that is
        missing or does not fit, DeviceError for a device that is.
        """
        check_options(
            FastLanguageModel.from_pretrained,
            options | {"rope_scaling": rope_scaling, "resize_model_vocab": resize_model_vocab},
            no_meaning=LOADING_NO_MEANING,
            not_offered=LOADING_NOT_OFFERED
            | {
                "rope_scaling": "set it in the model's config.json",
                "resize_model_vocab": "call model.resize_token_embeddings after loading",
            },
        )
        if token is not None:
            logger.warning(
                "from_pretrained: token is not kept; for a private model run `hf auth login`, or set HF_TOKEN"
            )
        if full_finetuning:
            load_in_4bit = False
        section = RunConfig.create(
            {
                "model": {
                    "name": model_name,
                    "revision": revision,
                    "max_seq_length": max_seq_length,
                    "dtype": "float32" if full_finetuning and dtype is None else _dtype_name(dtype),
                    "quantization": _quantization(load_in_4bit, load_in_8bit, load_in_16bit),
                    "device": _device(device_map),
                    "trust_remote_code": trust_remote_code,
                }
            }
        ).model
        model, tokenizer = load_model(section)
        _say_quantization(model, section)
        if full_finetuning:
            model = prepare_full(model)
        pin_date(tokenizer)
        return model, as_notebooks_expect(tokenizer)

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Sequence[str] | str = tuple(LLAMA_PROJECTIONS),
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: list[int] | int | None = None,
        layers_pattern: list[str] | str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: list[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        **options: Any,
    ) -> PeftModel:
        """`model` frozen, with a LoRA adapter in fp32. Any further field of PEFT's LoraConfig may be given.

        A `loftq_config`, or `init_lora_weights="loftq"`, starts the adapter by LoftQ. Gradient checkpointing is
        PyTorch's, on for True and "unsloth".

        Raises UsageError for unknown or contradictory options, ModelError for target modules that the model lacks.
        """
        peft_fields = set(LoraConfig.__dataclass_fields__)
        extra = {name: options.pop(name) for name in list(options) if name in peft_fields}
        check_options(
            FastLanguageModel.get_peft_model, options, no_meaning=ADAPTER_NO_MEANING, not_offered=ADAPTER_NOT_OFFERED
        )
        if isinstance(model, PeftModel):
            raise UsageError("get_peft_model() got a model that has an adapter already; pass what from_pretrained gave")
        loftq = bool(loftq_config) or init_lora_weights == "loftq"
        section = RunConfig.create(
            {
                "lora": {
                    "r": r,
                    "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
                    "lora_alpha": lora_alpha,
                    "lora_dropout": lora_dropout,
                    "bias": bias,
                    "use_rslora": use_rslora,
                    "layers_to_transform": layers_to_transform,
                    "layers_pattern": layers_pattern,
                    "modules_to_save": modules_to_save,
                    "init_lora_weights": True if loftq else init_lora_weights,
                    "loftq": loftq,
                    **extra,
                }
            }
        ).lora
        assert isinstance(section, LoraSection)
        return FastLanguageModel.for_training(
            attach_lora(model, section, seed=random_state), use_gradient_checkpointing
        )

    @staticmethod
    def for_inference(model: Any) -> Any:
        """`model` in evaluation mode: no dropout, no gradient checkpointing. Generation itself is transformers'."""
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """`model` in training mode, with gradient checkpointing or without."""
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        return model.train()


def _dtype_name(dtype: torch.dtype | str | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _quantization(four: bool, eight: bool, sixteen: bool) -> str:
    if eight and sixteen:
        raise UsageError("got load_in_8bit and load_in_16bit; set one of them")
    if eight:  # load_in_4bit is on unless a notebook says otherwise
        return "int8"
    if sixteen:
        return "none"
    return "nf4" if four else "auto"


def _device(device_map: str | dict[str, Any]) -> str:
    """One device holds the model; a device map chooses between GPU and CPU."""
    wanted = str(device_map.get("", "auto") if isinstance(device_map, dict) else device_map)
    if wanted.startswith("cpu"):
        return "cpu"
    return "cuda" if wanted.startswith("cuda") or wanted.isdigit() else "auto"


def _say_quantization(model: Any, section: ModelSection) -> None:
    if section.quantization == "auto" and model.config.to_dict().get("quantization_config"):
        logger.warning("from_pretrained: %s was saved quantised and is used as it was saved", section.name)
