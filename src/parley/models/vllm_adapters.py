"""Which adapters vLLM reads as PEFT does, and the arguments of `vllm serve` that serve one.

vLLM reads r, lora_alpha, target_modules, bias and use_rslora of adapter_config.json (vllm/lora/peft_helper.py) and the
LoRA matrices of the linear layers (vllm/lora/lora_model.py). It refuses or ignores everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from parley.config import ModelSection
from parley.errors import ModelError, one_line
from parley.models.adapter_files import WEIGHTS_FILE, AdapterFields
from parley.models.base_answers import BASE_CHANGING_INITS

SHOWN = 3
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
UNREAD_FIELDS = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "velora_config", "monteclora_config", "kasa_config", "arrow_config",
)  # fmt: skip
LINEAR_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
)
"""Layers that vLLM's decoders of the Llama kind put LoRA matrices on."""


def unread_fields(fields: AdapterFields) -> list[str]:
    """Settings with which the adapter's answers in vLLM would not be its own."""
    unread = [name for name in UNREAD_FIELDS if fields.model_dump()[name]]
    if fields.bias != "none":
        unread.append(f"bias: {fields.bias}")
    if str(fields.init_lora_weights).lower().startswith(BASE_CHANGING_INITS):
        unread.append(f"init_lora_weights: {fields.init_lora_weights}")  # it changed the base, which vLLM does not
    return unread


def unread_modules(folder: Path) -> list[str]:
    """Modules in the adapter's file that vLLM puts no LoRA matrices on: head, embedding, trained base weights.

    Raises ModelError for a damaged file.
    """
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged ({one_line(error)}); save it again") from None
    unread: dict[str, None] = {}
    for name in names:
        module, _, matrix = name.partition(".lora_")
        if module.rsplit(".", 1)[-1] not in LINEAR_LAYERS or not matrix.startswith(("A.", "B.")):
            unread[module] = None
    return list(unread)


def unread_parts(folder: Path, fields: AdapterFields) -> str | None:
    """What of the adapter in `folder` vLLM would refuse or leave out, three of it by name; None where it reads all.

    Raises ModelError for a damaged file.
    """
    unread = unread_fields(fields) or unread_modules(folder)
    if not unread:
        return None
    more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
    return f"{', '.join(unread[:SHOWN])}{more}"


def max_lora_rank(rank: int) -> int | None:
    """The least --max-lora-rank for an adapter of `rank`; None where vLLM takes no such adapter."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), None)


def adapter_arguments(
    base_path: str, base: ModelSection, names: Sequence[str], weights: Path, tokenizer: Sequence[str], rank: int
) -> list[str]:
    """Arguments of `vllm serve`.

    `names` are those of the adapter and of its base; `weights` is the adapter's folder.
    """
    adapter_name, base_name = names
    arguments = [base_path, "--served-model-name", base_name, *tokenizer]
    if base.revision is not None:
        arguments += ["--revision", base.revision]
    if base.dtype != "auto":
        arguments += ["--dtype", base.dtype]
    if base.quantization == "nf4":
        arguments += ["--quantization", "bitsandbytes"]
    return [*arguments, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{adapter_name}={weights}"]


def tokenizer_arguments(weights: Path) -> list[str]:
    """The tokenizer and template in `weights`, in place of the base's."""
    template = weights / "chat_template.jinja"
    return ["--tokenizer", str(weights), *(["--chat-template", str(template)] if template.is_file() else [])]
