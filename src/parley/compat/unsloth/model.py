"""`FastLanguageModel`, `FastModel` and their aliases as notebooks call them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from parley.compat.unsloth.options import check_options
from parley.compat.unsloth.saving import with_saving
from parley.compat.unsloth.tokenizer import as_notebooks_expect
from parley.config import LLAMA_PROJECTIONS, LoraSection, ModelSection, RunConfig
from parley.data.render import pin_date
from parley.errors import UsageError, one_line
from parley.models.adapters import attach_lora, prepare_full
from parley.models.device import pick_device, pick_dtype
from parley.models.load import load_model

logger = logging.getLogger(__name__)

# Named in one line and otherwise ignored: they steer speed, memory or logging in Unsloth alone.
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
# Refused: they would change the result.
LOADING_NOT_OFFERED = {
    "load_in_fp8": "use load_in_4bit or load_in_8bit",
    "qat_scheme": "leave it out",
    "text_only": "load a model without a vision part",
}
ADAPTER_NO_MEANING = ["max_seq_length", "temporary_location", "offload_layers", "checkpoint_skip_layers"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Projections of an attention layer; LLAMA_PROJECTIONS has those of the feed-forward layer besides."""
EMBEDDINGS = ("embed_tokens", "lm_head")
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
        max_seq_length: int | None = 2048,
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
        attn_implementation: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> tuple[PreTrainedModel | PeftModel, Any]:
        """The model and its tokenizer: a hub id or a folder, an adapter's too.

        `load_in_4bit` means NF4 with double quantisation, on a CPU as well; without any of the `load_in_` options the
        checkpoint is taken as it was saved. `dtype` None is bf16 where the GPU has it, else fp16, and fp32 on a CPU;
        `torch_dtype` is its older name. `attn_implementation` is transformers' own. `max_seq_length` belongs to the
        trainer here; `fix_tokenizer` and `use_gradient_checkpointing` decide nothing.

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
        if dtype is not None and torch_dtype is not None:
            raise UsageError("from_pretrained() got both dtype and torch_dtype; set one of them")
        dtype = dtype if torch_dtype is None else torch_dtype
        if full_finetuning:
            # Unsloth's default of 4 bits is not meant for full fine-tuning: quantised weights cannot be trained.
            load_in_4bit = False
        section = RunConfig.create(
            {
                "model": {
                    "name": model_name,
                    "revision": revision,
                    "max_seq_length": 2048 if max_seq_length is None else max_seq_length,
                    # bf16 has 8 significant bits: small updates of full weights would be rounded away.
                    "dtype": "float32" if full_finetuning and dtype is None else _dtype_name(dtype),
                    "quantization": _quantization(load_in_4bit, load_in_8bit, load_in_16bit),
                    "device": _device(device_map),
                    "trust_remote_code": trust_remote_code,
                }
            }
        ).model
        model, tokenizer = load_model(section)
        if attn_implementation is not None:
            _set_attention(model, attn_implementation)
        _say_quantization(model, section)
        if full_finetuning:
            model = prepare_full(model)
        # As the trainer does: prompts in the notebook and training rows then have the same date.
        pin_date(tokenizer)
        return with_saving(model), as_notebooks_expect(tokenizer)

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Sequence[str] | str | None = tuple(LLAMA_PROJECTIONS),
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
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **options: Any,
    ) -> PeftModel:
        """`model` frozen, with a LoRA adapter in fp32. Any further field of PEFT's LoraConfig may be given.

        `finetune_attention_modules` and `finetune_mlp_modules` choose among `target_modules`; a text model has no
        vision layers, and its language layers are all it has. `embed_tokens` and `lm_head` among the target modules
        are trained whole, as `modules_to_save`.

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
        if not finetune_language_layers:
            raise UsageError("get_peft_model(finetune_language_layers=False) would train nothing of a text model")
        targets = _chosen_targets(target_modules, finetune_attention_modules, finetune_mlp_modules)
        if isinstance(targets, list) and (whole := [name for name in EMBEDDINGS if name in targets]):
            logger.warning("get_peft_model: %s: trained whole, as modules_to_save", " and ".join(whole))
            # Unsloth trains embeddings and head whole; LoRA matrices on them would be another model.
            targets = [name for name in targets if name not in whole]
            modules_to_save = sorted({*(modules_to_save or []), *whole})
        if isinstance(targets, list):
            targets = _present_targets(model, targets)
        loftq = bool(loftq_config) or init_lora_weights == "loftq"
        section = RunConfig.create(
            {
                "lora": {
                    "r": r,
                    "target_modules": targets,
                    "lora_alpha": lora_alpha,
                    "lora_dropout": lora_dropout,
                    "bias": bias,
                    "use_rslora": use_rslora,
                    "layers_to_transform": layers_to_transform,
                    "layers_pattern": layers_pattern,
                    "modules_to_save": modules_to_save,
                    # LoftQ has its own setting here: PEFT's value for it needs scipy and leaves the scale out.
                    "init_lora_weights": True if loftq else init_lora_weights,
                    "loftq": loftq,
                    **extra,
                }
            }
        ).lora
        assert isinstance(section, LoraSection)
        adapted = with_saving(attach_lora(model, section, seed=random_state))
        return FastLanguageModel.for_training(adapted, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """`model` in evaluation mode: no dropout, no gradient checkpointing. Generation itself is transformers'."""
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """`model` in training mode, with gradient checkpointing or without."""
        if use_gradient_checkpointing:
            # The reentrant variant gives no gradients where neither inputs nor base weights require them.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        return model.train()


class FastModel(FastLanguageModel):
    """FastLanguageModel under the name that notebooks for any kind of model use; text models alone."""


FastLlamaModel = FastMistralModel = FastQwen2Model = FastQwen3Model = FastLanguageModel
FastGemmaModel = FastGemma2Model = FastCohereModel = FastGraniteModel = FastLanguageModel


def _chosen_targets(targets: Sequence[str] | str | None, attention: bool, mlp: bool) -> list[str] | str:
    """Those of `targets` that are wanted. Raises UsageError where none is left, or where a pattern cannot be cut."""
    if not attention and not mlp:
        raise UsageError(
            "get_peft_model() got finetune_attention_modules=False and finetune_mlp_modules=False; set one of them"
        )
    if attention and mlp:
        return targets if isinstance(targets, str) else list(LLAMA_PROJECTIONS if targets is None else targets)
    if isinstance(targets, str) and targets != "all-linear":
        raise UsageError(f"get_peft_model() got target_modules={targets!r}, and finetune_ options choose from a list")
    names = LLAMA_PROJECTIONS if targets is None or isinstance(targets, str) else targets
    return [name for name in names if (name in ATTENTION) == attention]


def _present_targets(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Those of `targets` that the model has, as PEFT takes them; all of them where it has none, which is an error."""
    names = [f".{name}" for name, _ in model.named_modules()]
    absent = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if not absent or len(absent) == len(targets) or sorted(targets) == sorted(LLAMA_PROJECTIONS):
        return targets
    logger.warning("get_peft_model: %s has no %s", type(model).__name__, ", ".join(absent))
    return [target for target in targets if target not in absent]


def _set_attention(model: PreTrainedModel | PeftModel, implementation: str) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    try:
        base.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise UsageError(f"from_pretrained(attn_implementation={implementation!r}): {one_line(error)}") from None


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
