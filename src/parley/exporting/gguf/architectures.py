"""How llama.cpp's architectures compute transformers' families: one declaration each.

What a family computes is read from its declaration in `parley.models.families`; what is declared here is llama.cpp's
side of it (src/models/ and the rope types in src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, TensorNameMap, get_tensor_name_map
from torch import Tensor

from parley.errors import ModelError
from parley.models.families import FAMILIES, ModelFamily

GEMMA_FIXED_PATTERN = 6  # llama.cpp: every sixth layer of Gemma 3 attends to the whole context
GEMMA2_27B_LAYERS = 46
GEMMA3_27B_LAYERS = 62
LOCAL_ROPE_THETA = 10_000.0  # llama.cpp: base of Gemma 3's sliding layers
SUFFIXES = (".weight", ".bias")
MERGED = "use --to merged"


_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_ALL_LINEAR = _QKV | {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
ROPE_TYPES = frozenset({"default", "linear", "yarn"})
"""Scalings that are metadata alone, which every architecture reads."""
YARN_UNREAD = ("attention_factor", "mscale", "mscale_all_dim")
SMOLLM3_PERIOD = 4  # llama.cpp: every fourth layer of SmolLM3 has no rotary embedding


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp computes it.

    Attributes:
        family: Parley's declaration of the family.
        arch: llama.cpp's name for it.
        interleaved_rope: queries and keys are rotated in neighbouring pairs, where transformers rotates halves: the
            rows of their projections are permuted.
        windows: whether llama.cpp applies sliding windows.
        biases: the linear modules whose biases llama.cpp adds.
        rope_types: the scalings of rotary embeddings that it computes.
        tied_head: whether it takes the embedding where the file has no head.
        check: why a configuration cannot be computed by llama.cpp; None where it can.
        add_metadata: keys beyond those that all have.
    """

    family: ModelFamily
    arch: MODEL_ARCH
    interleaved_rope: bool = False
    windows: bool = False
    biases: frozenset[str] = frozenset()
    rope_types: frozenset[str] = ROPE_TYPES
    tied_head: bool = True
    check: Callable[[Any], str | None] = lambda config: None
    add_metadata: Callable[[GGUFWriter, Any], None] = lambda writer, config: None

    def names(self, config: Any) -> TensorNameMap:
        return get_tensor_name_map(self.arch, config.num_hidden_layers)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The parameters of the layers with full attention, where those of sliding layers are apart."""
    parameters = config.rope_parameters
    return {"rope_type": "default"} | dict(parameters.get("full_attention", parameters))


def head_size(config: Any) -> int:
    """E: the size of an attention head."""
    declared = config.to_dict().get("head_dim")
    return int(declared or config.hidden_size // config.num_attention_heads)


def context_length(config: Any, architecture: Architecture) -> int:
    """Tokens for which llama.cpp computes what transformers does: at most the window where llama.cpp has none."""
    windows = [architecture.family.window(config, layer) for layer in range(config.num_hidden_layers)]
    longest = int(config.max_position_embeddings)
    if architecture.windows:
        return longest
    return min([longest, *(window for window in windows if window)])


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
    if architecture.family.norm_offset and name.endswith("norm.weight"):
        return value.to(torch.float32) + architecture.family.norm_offset
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
    local = config.rope_parameters["sliding_attention"]
    if local["rope_theta"] != LOCAL_ROPE_THETA or local.get("rope_type", "default") != "default":
        return "rope_parameters of its sliding layers are not those of llama.cpp, rope_theta 10,000 without scaling"
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


def _check_smollm3(config: Any) -> str | None:
    rotated = [FAMILIES["smollm3"].rope(config, layer) is not None for layer in range(config.num_hidden_layers)]
    if rotated != [(layer + 1) % SMOLLM3_PERIOD != 0 for layer in range(config.num_hidden_layers)]:
        return "its no_rope_layers differ from llama.cpp's, where every fourth layer has no rotary embedding"
    return None


def _add_granite(writer: GGUFWriter, config: Any) -> None:
    family = FAMILIES["granite"]
    embedding, residual, logits = (
        factor(config) for factor in (family.embedding_scale, family.residual_scale, family.logit_scale)
    )
    assert embedding is not None
    assert residual is not None
    assert logits is not None
    writer.add_embedding_scale(embedding)
    writer.add_residual_scale(residual)
    writer.add_logit_scale(1 / logits)  # llama.cpp divides by it
    writer.add_attention_scale(config.attention_multiplier)


_LLAMA_ROPE = ROPE_TYPES | {"llama3"}
ARCHITECTURES = {
    architecture.family.model_type: architecture
    for architecture in (
        Architecture(
            FAMILIES["llama"], MODEL_ARCH.LLAMA, interleaved_rope=True, biases=_ALL_LINEAR, rope_types=_LLAMA_ROPE
        ),
        Architecture(FAMILIES["mistral"], MODEL_ARCH.LLAMA, interleaved_rope=True, rope_types=_LLAMA_ROPE),
        Architecture(FAMILIES["qwen2"], MODEL_ARCH.QWEN2, biases=_QKV),
        Architecture(FAMILIES["qwen3"], MODEL_ARCH.QWEN3, biases=_QKV),
        Architecture(
            FAMILIES["gemma2"],
            MODEL_ARCH.GEMMA2,
            windows=True,
            biases=_QKV,
            check=_check_gemma2,
            add_metadata=_add_gemma2,
        ),
        Architecture(
            FAMILIES["gemma3_text"],
            MODEL_ARCH.GEMMA3,
            windows=True,
            biases=_QKV,
            check=_check_gemma3,
            add_metadata=_add_gemma3,
        ),
        Architecture(FAMILIES["phi3"], MODEL_ARCH.PHI3, rope_types=ROPE_TYPES | {"longrope"}, add_metadata=_add_phi3),
        Architecture(
            FAMILIES["granite"],
            MODEL_ARCH.GRANITE,
            interleaved_rope=True,
            biases=_ALL_LINEAR,
            rope_types=_LLAMA_ROPE,
            add_metadata=_add_granite,
        ),
        Architecture(FAMILIES["smollm3"], MODEL_ARCH.SMOLLM3, interleaved_rope=True, biases=_QKV, check=_check_smollm3),
        Architecture(FAMILIES["olmo2"], MODEL_ARCH.OLMO2, tied_head=False),
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
    family = architecture.family
    activation, rope = config.to_dict().get(family.activation_field), rope_parameters(config)["rope_type"]
    reason = architecture.check(config) or _check_yarn(config)
    if activation != family.activation:
        reason = f"the activation {activation}, where llama.cpp computes {family.activation}"
    if rope not in architecture.rope_types:
        reason = f"rope_type {rope!r}, where llama.cpp computes {', '.join(sorted(architecture.rope_types))}"
    if reason is not None:
        raise ModelError(f"{name}: cannot be exported to GGUF: {reason}; use --to merged")
    return architecture


def _check_yarn(config: Any) -> str | None:
    # llama.cpp has one attention factor, 0.1 ln(factor) + 1, and DeepSeek's second one is of its own architecture.
    fields = [name for name in YARN_UNREAD if rope_parameters(config).get(name) is not None]
    if rope_parameters(config)["rope_type"] == "yarn" and fields:
        return f"rope_parameters.{fields[0]} with yarn, which llama.cpp does not compute"
    return None


def check_tensors(architecture: Architecture, names: Iterable[str], layers: int, model: str) -> None:
    """Raises ModelError where llama.cpp has no place for a tensor of `names`, or reads it and leaves it out."""
    table = get_tensor_name_map(architecture.arch, layers)
    for name in names:
        if table.get_name(name, try_suffixes=SUFFIXES) is None:
            raise ModelError(f"{model}: {name} has no place in GGUF, as {architecture.arch.name} has none; {MERGED}")
        module = name.removesuffix(".bias").split(".", 3)[-1]
        if name.endswith(".bias") and module not in architecture.biases:
            raise ModelError(f"{model}: llama.cpp adds no {name} in {architecture.arch.name} models; {MERGED}")
