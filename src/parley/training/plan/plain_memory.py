"""Memory of a pass of the plain path, counted on fake tensors: the model's own code runs, and nothing is allocated.

transformers' modules, PEFT's layers, autograd and activation checkpointing run as they would on the device, and every
storage is counted while it is alive. Two passes over a few layers give the bytes of a layer; the others are alike.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from parley.library_compat.torch import LiveBytes, fake_tensors

LAYERS = (2, 4)  # simulated; the rest is extrapolated
HEAD_TILE = 32768  # columns of the vocabulary that TRL's fused head multiplies at a time, for so many rows:
HEAD_ROWS = 4096


@dataclass(frozen=True)
class PassShape:
    """One pass: `rows` of `length` tokens. `masked`: with an attention mask, as packed and padded rows have one.

    Attributes:
        compute_dtype: of autocast; None where the model computes in its own type.
        checkpointing: whether activations are recomputed layer by layer.
        accumulated: whether gradients of an earlier pass of the step are there.
    """

    rows: int
    length: int
    masked: bool
    compute_dtype: torch.dtype | None
    checkpointing: bool
    accumulated: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def pass_bytes(model: Any, shape: PassShape) -> int:
    """The peak of activations, gradients and temporaries in a pass of `model` (on the meta device).

    Raises what transformers' code raises where its course depends on values, which fake tensors do not have.
    """
    total = len(_layers(_base(model)))
    if total <= LAYERS[-1]:
        return _simulate(model, shape, total)
    few, more = LAYERS
    peak, peak_of_more = (_simulate(model, shape, count) for count in LAYERS)
    return peak + (peak_of_more - peak) * (total - few) // (more - few)


def _simulate(model: Any, shape: PassShape, layers: int) -> int:
    model = _shallow_copy(model, layers)
    base = _base(model)
    with fake_tensors():
        weights = _make_fake(model)
        _prepare(base, checkpointing=shape.checkpointing)
        model.train()
        memory = LiveBytes()
        with memory:
            for tensor in weights:
                memory.add(tensor)
            weights_bytes = memory.live
            if shape.accumulated:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            _pass(base, shape)
    return memory.peak - weights_bytes


def _base(model: Any) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _shallow_copy(model: Any, layers: int) -> Any:
    """A copy of `model` with its first `layers` decoder layers. Its tensors, on the meta device, are not copied."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = _layers(_base(model))
    memo[id(found)] = copy.deepcopy(found[:layers], memo)
    return copy.deepcopy(model, memo)


def _pass(base: PreTrainedModel, shape: PassShape) -> None:
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    mask = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool) if shape.masked else None
    autocast = nullcontext() if shape.compute_dtype is None else torch.autocast("cpu", shape.compute_dtype)
    with autocast:
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        hidden_SD = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        log_probs = _FusedHead.apply(hidden_SD, head.weight, shape.compute_dtype or hidden.dtype)
    log_probs.sum().backward()


class _FusedHead(torch.autograd.Function):
    """Allocates what TRL's ChunkedLogProbFunction does: one tile of logits, and gradients in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_SD, weight_VD)
        ctx.dtype = dtype
        tile = hidden_SD.new_empty(min(len(hidden_SD), HEAD_ROWS), min(HEAD_TILE, len(weight_VD)), dtype=dtype)
        return tile.new_empty(len(hidden_SD), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden_SD, weight_VD = ctx.saved_tensors
        found: list[Tensor | None] = []
        for tensor, needed in zip((hidden_SD, weight_VD), ctx.needs_input_grad, strict=False):
            found.append(torch.zeros(tensor.shape, dtype=torch.float32) if needed else None)
        tile = hidden_SD.new_empty(min(len(hidden_SD), HEAD_ROWS), min(HEAD_TILE, len(weight_VD)), dtype=ctx.dtype)
        del tile
        pairs = zip(found, (hidden_SD, weight_VD), strict=True)
        return *(None if g is None else g.to(tensor.dtype) for g, tensor in pairs), None


def _layers(base: nn.Module) -> nn.ModuleList:
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer):
            return module
    raise NotImplementedError(f"{type(base).__name__} has no list of decoder layers")


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Put fake tensors in place of the meta ones, tied weights as one; returns all of them."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
            module.register_buffer(name, made[id(buffer)], persistent=False)
    return list(made.values())


def _prepare(base: PreTrainedModel, *, checkpointing: bool) -> None:
    if not checkpointing:
        return
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()  # as the trainer does where the embedding is frozen
