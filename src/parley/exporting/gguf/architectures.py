"""How llama.cpp's architectures differ from transformers' families: one declaration each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, TensorNameMap, get_tensor_name_map
from torch import Tensor

from parley.errors import ModelError

GEMMA_FIXED_PATTERN = 6  # llama.cpp: every sixth layer of Gemma 3 attends to the whole context
GEMMA2_27B_LAYERS = 46
GEMMA3_27B_LAYERS = 62
LOCAL_ROPE_THETA = 10_000.0  # llama.cpp: base of Gemma 3's sliding layers


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp computes it.

    Attributes:
        model_type: transformers' name of the family (`config.model_type`).
        arch: llama.cpp's.
        interleaved_rope: queries and keys are rotated in neighbouring pairs, where transformers rotates halves: the
            rows of their projections are permuted.
        norm_offset: added to the weights of norms, which transformers stores around zero for Gemma.
        activation: the only one that llama.cpp computes for this architecture, as transformers names it.
        windows: whether llama.cpp applies sliding windows.
        check: why a configuration cannot be computed by llama.cpp; None where it can.
        add_metadata: keys beyond those that all have.
    """

    model_type: str
    arch: MODEL_ARCH
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    windows: bool = False
    check: Callable[[Any], str | None] = lambda config: None
    add_metadata: Callable[[GGUFWriter, Any], None] = lambda writer, config: None

    def names(self, config: Any) -> TensorNameMap:
        return get_tensor_name_map(self.arch, config.num_hidden_layers)


def head_size(config: Any) -> int:
    """E: the size of an attention head."""
    declared = config.to_dict().get("head_dim")
    return int(declared or config.hidden_size // config.num_attention_heads)


def context_length(config: Any, architecture: Architecture) -> int:
    """Tokens for which llama.cpp computes what transformers does: at most the window where llama.cpp has none."""
    window = smallest_window(config)
    if architecture.windows or window is None:
        return int(config.max_position_embeddings)
    return min(int(config.max_position_embeddings), window)


def smallest_window(config: Any) -> int | None:
    """The sliding window in tokens where some layer has one."""
    fields = config.to_dict()
    window, kinds = fields.get("sliding_window"), fields.get("layer_types")
    if not window or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def permuted(value: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias), from halves to neighbouring pairs within each head.

    Row i of the first half of a head comes to 2 i, row i of the second half to 2 i + 1.
    """
    pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def converted(architecture: Architecture, config: Any, name: str, value: Tensor) -> Tensor:
    """The tensor `name` of transformers' state dict as llama.cpp's graph wants it."""
    if architecture.interleaved_rope and ".q_proj." in name:
        return permuted(value, config.num_attention_heads)
    if architecture.interleaved_rope and ".k_proj." in name:
        return permuted(value, config.num_key_value_heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return value.to(torch.float32) + architecture.norm_offset
    return value


def _check_gemma2(config: Any) -> str | None:
    # llama.cpp scales queries by the head size, and of the 27B model by hidden size over heads.
    size = config.hidden_size // config.num_attention_heads
    scale = size if config.num_hidden_layers == GEMMA2_27B_LAYERS else head_size(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar} and llama.cpp computes with {scale}"
    if config.layer_types != ["sliding_attention", "full_attention"] * (config.num_hidden_layers // 2) + (
        ["sliding_attention"] * (config.num_hidden_layers % 2)
    ):
        return "its layer_types do not alternate between sliding and full attention, as llama.cpp's do"
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        return "it has no soft-capped logits, which llama.cpp always computes"
    return None


def _check_gemma3(config: Any) -> str | None:
    size = config.hidden_size // config.num_attention_heads
    scale = size if config.num_hidden_layers == GEMMA3_27B_LAYERS else head_size(config)
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar} and llama.cpp computes with {scale}"
    full = [(layer + 1) % GEMMA_FIXED_PATTERN == 0 for layer in range(config.num_hidden_layers)]
    if [kind == "full_attention" for kind in config.layer_types] != full:
        return "its layer_types differ from llama.cpp's, where every sixth layer has full attention"
    if config.rope_parameters["sliding_attention"]["rope_theta"] != LOCAL_ROPE_THETA:
        return "rope_theta of its sliding layers is not 10,000, which llama.cpp computes with"
    if config.attn_logit_softcapping:
        return "attn_logit_softcapping, which llama.cpp does not compute for Gemma 3"
    return "use_bidirectional_attention" if config.use_bidirectional_attention else None


def _add_gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _add_gemma3(writer: GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _add_phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(0)  # llama.cpp computes no windows for Phi-3 (its issue 13676)


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", MODEL_ARCH.LLAMA, interleaved_rope=True),
        Architecture("mistral", MODEL_ARCH.LLAMA, interleaved_rope=True),
        Architecture("qwen2", MODEL_ARCH.QWEN2),
        Architecture("qwen3", MODEL_ARCH.QWEN3),
        Architecture(
            "gemma2",
            MODEL_ARCH.GEMMA2,
            norm_offset=1.0,
            activation="gelu_pytorch_tanh",
            windows=True,
            check=_check_gemma2,
            add_metadata=_add_gemma2,
        ),
        Architecture(
            "gemma3_text",
            MODEL_ARCH.GEMMA3,
            norm_offset=1.0,
            activation="gelu_pytorch_tanh",
            windows=True,
            check=_check_gemma3,
            add_metadata=_add_gemma3,
        ),
        Architecture("phi3", MODEL_ARCH.PHI3, add_metadata=_add_phi3),
    )
}


def architecture_of(config: Any, name: str) -> Architecture:
    """The architecture of a transformers configuration. Raises ModelError where llama.cpp would compute otherwise."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"{name}: {config.model_type} models are not exported to GGUF; Parley knows "
            f"{', '.join(sorted(ARCHITECTURES))}; use --to merged, and llama.cpp's own converter"
        )
    fields = config.to_dict()
    activation = fields.get("hidden_activation") or fields.get("hidden_act")
    reason = architecture.check(config)
    if activation != architecture.activation:
        reason = f"the activation {activation}, where llama.cpp computes {architecture.activation}"
    if reason is not None:
        raise ModelError(f"{name}: cannot be exported to GGUF: {reason}; use --to merged")
    return architecture
