"""Whether documents of one packed row see each other in a transformers model: shown by a probe, not assumed.

transformers isolates packed documents by `position_ids` that restart, in models that build their attention masks from
them. In others documents see each other without an error: recurrent and convolutional layers, ALiBi, learned absolute
positions, chunked attention, and rotary embeddings that depend on the length of the text. So before a model is trained
or evaluated on packed rows through transformers, ask

    reason = why_not_packed(model, max_tokens)

None: every document of a packed row has the logits that it has by itself. Else take one padded row per document, and
say the reason. The fused step (parley.train_step) isolates documents itself and need not ask.

The probe builds a small model of the model's own class and configuration: all its kinds of layers, but fewer heads and
experts, narrow MLPs, a small vocabulary, short windows and short position limits. It runs once per class,
configuration, attention implementation and device type, in about a second.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from parley.errors import one_line
from parley.library_compat.transformers import attention_implementation

VOCABULARY = 64
SPECIAL_TOKENS = 8  # ids below are left to padding, images and the like
WIDTH = 16  # of MLPs and experts
WINDOW = 6  # of sliding-window and chunked attention: shorter than the documents
CHUNK = 8  # of state-space layers
POSITIONS = 16  # rotary embeddings that depend on the length change beyond so many tokens
LENGTHS = (9, 4, 24, 1, 7)  # one beyond POSITIONS, with short ones before and behind it
ORIGINAL = "original_max_position_embeddings"
MAX_PARAMETERS = 200_000_000
NOISE = 0.1  # added to every weight, so that norms, sinks and gates are off their neutral initial values
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest logit; a leak is of the order of 1

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
_MLP = re.compile(r"intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|n_inner|d_ff")
_WINDOW = re.compile(r"(sliding_window|window_size|attention_chunk_size)$")
LENGTH_DEPENDENT_ROPE = re.compile(r"dynamic|longrope")
# What a constructor or a forward pass raises when it cannot cope with the small shape.
_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


PackedLogits = Callable[[PreTrainedModel, Tensor, Sequence[int]], Tensor]
"""From a model, tokens (T) and the lengths of their documents to fp32 logits (T, V)."""


def why_not_packed(
    model: nn.Module, max_tokens: int | None = None, packed_logits: PackedLogits | None = None
) -> str | None:
    """Why documents of a packed row may see each other in `model`, in one line; None where they are shown not to.

    Args:
        model: of transformers, bare or with PEFT's adapters, on any device and quantised or not.
        max_tokens: the most that a document has, None where that is unknown. Dynamic and longrope rotary embeddings
            isolate documents up to the length at which they begin to change.
        packed_logits: another forward pass of a packed row than the model's own, whose results are compared with the
            model's own for each document by itself.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return f"packing was not tried, since {type(base).__name__} is no transformers model"
    device = torch.device("cuda" if base.device.type == "cuda" else "cpu")
    key = base.config.to_json_string(use_diff=False)
    kinds = frozenset(_architecture_modules(base))
    return _probe(
        _Subject(
            _class_of(base), key, attention_implementation(base), device, kinds, max_tokens, packed_logits, base.config
        )
    )


@dataclass(frozen=True)
class _Subject:
    """What the answer depends on. `kinds`: the classes of modules that the small model must have, too."""

    architecture: type[PreTrainedModel]
    config_json: str
    attention: str
    device: torch.device
    kinds: frozenset[type[nn.Module]]
    max_tokens: int | None
    packed_logits: PackedLogits | None
    config: PreTrainedConfig = field(compare=False)


@lru_cache(maxsize=16)
def _probe(subject: _Subject) -> str | None:
    name = subject.architecture.__name__
    if "position_ids" not in inspect.signature(subject.architecture.forward).parameters:
        return f"{name} takes no position_ids, so that documents of a packed row would see each other"
    try:
        with torch.random.fork_rng(devices=[]):  # constructors sample their weights: a run's seed is not disturbed
            model = _small_model(subject)
        difference = _largest_difference(model, subject.device, subject.packed_logits)
    except _ERRORS as error:
        return one_line(f"packing could not be tried on a small {name} ({type(error).__name__}: {error})")
    if difference <= TOLERANCE[model.dtype]:  # False for NaN
        return None
    return f"documents of a packed row see each other in {name}"


def _small_model(subject: _Subject) -> PreTrainedModel:
    """A small model that has modules of all kinds, of as few layers as that takes."""
    for few_layers in (True, False):
        shrunk = shrink(subject.config, subject.max_tokens, few_layers=few_layers)
        with torch.device("meta"):
            on_meta = subject.architecture(copy.deepcopy(shrunk))
        missing = subject.kinds - set(_architecture_modules(on_meta))
        if not missing:
            break
    else:
        raise ValueError(f"it has no {', '.join(sorted(kind.__name__ for kind in missing))}")
    if on_meta.num_parameters() > MAX_PARAMETERS:
        raise ValueError(f"{on_meta.num_parameters():,} parameters are not small")
    model = subject.architecture(shrunk)
    model.set_attn_implementation(subject.attention)
    # Flash kernels take 16-bit types alone, and Parley's own wide heads in these alone.
    on_gpu = subject.packed_logits is not None and subject.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu or "flash" in subject.attention else torch.float32
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.nan_to_num(parameter.float()) + NOISE * noise)
    return model.to(subject.device, dtype).eval()


@torch.no_grad()
def _largest_difference(
    model: PreTrainedModel, device: torch.device, packed_logits: PackedLogits | None = None
) -> float:
    """How far a document's logits in a packed row are from those it has by itself, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    ids_T = torch.randint(SPECIAL_TOKENS, VOCABULARY, (sum(LENGTHS),), generator=generator).to(device)
    if packed_logits is not None:
        packed_TV = packed_logits(model, ids_T, LENGTHS)
    else:
        position_T = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
        packed_TV = _logits(model, ids_T, position_T)
    alone_TV = torch.cat([_logits(model, ids_L, None) for ids_L in ids_T.split(LENGTHS)])
    return float((packed_TV - alone_TV).abs().max() / alone_TV.abs().max())


def _logits(model: PreTrainedModel, ids_T: Tensor, position_T: Tensor | None) -> Tensor:
    positions = {} if position_T is None else {"position_ids": position_T[None]}
    return model(input_ids=ids_T[None], **positions, use_cache=False).logits[0].float()


def shrink(config: PreTrainedConfig, max_tokens: int | None, *, few_layers: bool) -> PreTrainedConfig:
    """`config` with small sizes. Head sizes stay, since lists of rotary factors are as long.

    `few_layers`: a prefix of the layers that has every value of each per-layer list.
    """
    config = copy.deepcopy(config)
    for section in _sections(config):
        fields = _Fields(section)
        _shrink_heads(fields)
        _shrink_experts(fields)
        if few_layers:
            _shrink_depth(fields)
        if LENGTH_DEPENDENT_ROPE.search(json.dumps(fields.get("rope_parameters"), default=str)):
            _shrink_positions(fields, max_tokens)
        for name, value in fields.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            if name.endswith("_token_id") and value >= VOCABULARY:
                fields.set(name, 0)
            elif "vocab_size" in name:
                fields.set(name, VOCABULARY)
            elif _MLP.search(name):
                fields.set(name, min(value, WIDTH))
            elif _WINDOW.search(name):
                fields.set(name, min(value, WINDOW))
            elif name.endswith("chunk_size"):  # of state-space layers: only how they are computed
                fields.set(name, min(value, CHUNK))
    return config


class _Fields:
    """A configuration's own fields, by the names that all of transformers' configurations answer to."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def _name(self, name: str) -> str:
        return self.config.attribute_map.get(name, name)

    def get(self, name: str) -> Any:
        return vars(self.config).get(self._name(name))

    def set(self, name: str, value: Any) -> None:
        setattr(self.config, self._name(name), value)

    def items(self) -> list[tuple[str, Any]]:
        return list(vars(self.config).items())


def _sections(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """`config` and the configurations inside of it (text, vision, ...)."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _sections(value)


def _shrink_heads(fields: _Fields) -> None:
    """Two query heads, or two groups of two that share a key-value head; the hidden size follows."""
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    hidden = fields.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    head_dim = fields.get("head_dim") or hidden // heads
    few = 4 if isinstance(kv_heads, int) and 1 < kv_heads < heads else 2
    fields.set("num_attention_heads", few)
    if isinstance(kv_heads, int):
        fields.set("num_key_value_heads", {heads: few, 1: 1}.get(kv_heads, 2))
    fields.set("hidden_size", few * head_dim)
    if fields.get("word_embed_proj_dim") == hidden:  # OPT's embedding may be narrower than its layers
        fields.set("word_embed_proj_dim", few * head_dim)


def _shrink_experts(fields: _Fields) -> None:
    """As many experts as a token goes through.

    Among more of them a difference in rounding may choose another expert, which looks like a leak: in float32 with
    hundreds of experts, in bfloat16 with a few.
    """
    chosen = next((k for k in map(fields.get, EXPERTS_PER_TOKEN) if isinstance(k, int)), None)
    if chosen is None:
        return
    for name in EXPERTS:
        if isinstance(fields.get(name), int):
            fields.set(name, max(chosen, 2))  # one alone would be a dense MLP in some models
    for name in ("n_group", "topk_group"):  # groups of experts, of which the best are chosen first
        if isinstance(fields.get(name), int):
            fields.set(name, 1)


def _shrink_depth(fields: _Fields) -> None:
    layers = fields.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    per_layer = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == layers}
    values = [set(map(str, value)) for value in per_layer.values()]
    depth = 2
    while depth < layers and any(
        set(map(str, value[:depth])) != every for value, every in zip(per_layer.values(), values, strict=True)
    ):
        depth += 1
    fields.set("num_hidden_layers", min(depth, layers))
    for name, value in per_layer.items():
        fields.set(name, value[:depth])


def _shrink_positions(fields: _Fields, max_tokens: int | None) -> None:
    """Let rotary embeddings that depend on the length change within the probe's documents, if real ones can."""
    rope = copy.deepcopy(fields.get("rope_parameters"))
    groups = [group for group in (rope, *rope.values()) if isinstance(group, dict)]  # one, or one per type of layer
    limits = [group[ORIGINAL] for group in groups if ORIGINAL in group]
    limit = min(limits or [fields.get(ORIGINAL) or fields.get("max_position_embeddings")])
    if max_tokens is not None and max_tokens <= limit:
        return
    fields.set("max_position_embeddings", POSITIONS)
    if fields.get(ORIGINAL) is not None:
        fields.set(ORIGINAL, POSITIONS)
    for group in groups:
        if ORIGINAL in group:
            group[ORIGINAL] = POSITIONS
    fields.set("rope_parameters", rope)


def _architecture_modules(model: PreTrainedModel) -> Iterator[type[nn.Module]]:
    """The classes of `model`'s modules that a modeling file defines; adapters and quantised layers are not."""
    home = _class_of(model).__module__
    kinds = map(_class_of, model.modules())
    return (kind for kind in kinds if kind.__module__.startswith((home, "transformers.models.")))


def _class_of(module: nn.Module) -> type[Any]:
    """The class of `module` as it was before FSDP2, which makes it one of a subclass."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
