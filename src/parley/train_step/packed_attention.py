"""Attention inside the documents of a packed row for transformers' modules, through transformers' attention interface.

`using_packed_attention(model, batch)` lets a model call it for as long as the context lasts. The function that is
registered knows the batch, since some models hand no arguments of the forward pass on to their attention layers. The
documents are read from the batch's tensors on the device, so that a CUDA graph can be replayed for others.

Shape suffixes (legend in docs/design.md): T tokens, H query heads, G key-value heads, E head size, C query, key and
value columns, D query columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from parley.library_compat.transformers import attention_implementation
from parley.train_step.bind import MAX_TRITON_HEAD, MIN_TRITON_HEAD, Unsupported
from parley.train_step.context_parallel import context_attention
from parley.train_step.device_ops import ops_for
from parley.train_step.ops import AttentionShape
from parley.train_step.packed_batch import DeviceBatch

NAME = "parley_packed"

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

# What models pass beside queries, keys and values without a meaning of its own for the result.
HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "is_causal",
        "return_dict",
    }
)


class PackedAttention(torch.autograd.Function):
    """The attention of train_step.ops as a function of autograd. Keys and values have fewer heads than queries."""

    @staticmethod
    def forward(
        ctx: Any, q_HTE: Tensor, k_GTE: Tensor, v_GTE: Tensor, sinks_H: Tensor | None, batch: DeviceBatch,
        shape: AttentionShape,
    ) -> Tensor:  # fmt: skip
        # The operations read fused rows, as the fused step's products write them.
        x_TC = torch.cat([x.transpose(0, 1).flatten(1) for x in (q_HTE, k_GTE, v_GTE)], dim=1)
        out_TD = x_TC.new_empty(len(x_TC), shape.heads * shape.head_dim)
        ctx.state = ops_for(x_TC.device).attention(x_TC, batch, shape, out_TD, sinks_H)
        ctx.batch, ctx.shape = batch, shape
        ctx.save_for_backward(x_TC, out_TD, sinks_H)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *dout: Tensor) -> tuple[Any, ...]:
        x_TC, out_TD, sinks_H = ctx.saved_tensors
        dx_TC = torch.empty_like(x_TC)
        ops = ops_for(x_TC.device)
        dout_TD = dout[0].contiguous()
        ops.attention_backward(dout_TD, x_TC, out_TD, ctx.state, ctx.batch, ctx.shape, dx_TC)
        dq, dk, dv = (part.transpose(0, 1) for part in ctx.shape.split_qkv(dx_TC))
        dsinks_H = None
        if ctx.needs_input_grad[3]:
            dsinks_H = ops.sink_gradient(dout_TD, out_TD, ctx.state, sinks_H, ctx.batch, ctx.shape).to(sinks_H)
        return dq, dk, dv, dsinks_H, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_batch: DeviceBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' interface wants it: heads (1, H, T, E) in, (1, T, H, E) out.

    Raises Unsupported for what it would compute differently from the model's own.
    """
    given = sorted(
        name for name, other in others.items() if other is not None and other is not False and name not in HARMLESS
    )
    if packed_batch is None:
        raise Unsupported(f"{type(module).__name__} attends outside of a pass over a packed row")
    if dropout:
        raise Unsupported(f"attention dropout of {dropout}")
    if given:
        raise Unsupported(f"{type(module).__name__} attends with {', '.join(given)}")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    # Latent attention (DeepSeek) has keys wider than values: columns of zeros change neither scores nor results.
    columns = value.shape[3]
    head_dim = max(query.shape[3], columns)
    query, key, value = (_with_columns(x, head_dim) for x in (query, key, value))
    heads = query.shape[1]
    if query.is_cuda and not MIN_TRITON_HEAD <= head_dim <= MAX_TRITON_HEAD[query.dtype]:
        raise Unsupported(f"attention heads of {head_dim} in {query.dtype}")
    shape = AttentionShape(heads, key.shape[1], head_dim, scale, sliding_window, softcap)
    if packed_batch.context is not None:
        _check_context(shape, s_aux)
        out_TD = context_attention(query[0], key[0], value[0], packed_batch.context, shape)
    else:
        out_TD = PackedAttention.apply(query[0], key[0], value[0], s_aux, packed_batch, shape)
    return out_TD.view(1, -1, heads, head_dim)[..., :columns], None


def _with_columns(x: Tensor, columns: int) -> Tensor:
    # functional.pad copies even where there is nothing to add.
    return x if x.shape[3] == columns else functional.pad(x, (0, columns - x.shape[3]))


def _check_context(shape: AttentionShape, s_aux: Tensor | None) -> None:
    """Raises Unsupported for attention that is not split over ranks."""
    for unsupported, reason in (
        (shape.softcap is not None, "attention with a soft cap"),
        (s_aux is not None, "attention sinks"),
    ):
        if unsupported:
            raise Unsupported(f"{reason} is not split over processes (training.context_parallel)")


def check_attention_dropout(config: PreTrainedConfig) -> None:
    """Raises Unsupported where the configuration has it; `packed_attention` does so in the first pass that drops."""
    fields = vars(config.get_text_config())
    rate = next((fields[name] for name in ATTENTION_DROPOUT if fields.get(name)), None)
    if rate is not None:
        raise Unsupported(f"attention dropout of {rate}")


@contextmanager
def using_packed_attention(model: PreTrainedModel, batch: DeviceBatch) -> Iterator[None]:
    """`model` attends inside the documents of `batch`; afterwards as before."""
    AttentionInterface.register(NAME, partial(packed_attention, packed_batch=batch))
    own = attention_implementation(model)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        AttentionInterface.register(NAME, packed_attention)  # which keeps no batch in memory
