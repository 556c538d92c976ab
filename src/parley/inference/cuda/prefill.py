"""Prefill of new prompts on a GPU: packed end to end without padding, through the training step's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document, split_by_tokens
from parley.inference.interface import DecodeRequest
from parley.inference.kv_cache import KVCache
from parley.inference.model import Attention, DecoderModel
from parley.train_step.packed_batch import DeviceBatch, StagingBuffer, pack

PREFILL_TOKENS = 8192  # of one pass: bounds the memory of its activations


def prefill(
    model: DecoderModel, cache: KVCache, staging: StagingBuffer, requests: Sequence[DecodeRequest], start: int
) -> None:
    """Write the keys and values of each prompt, but for its last token, into the cache's rows from `start` on.

    The last token is the one that the first decode step reads, so the passes here need no head.
    """
    order = [index for index, request in enumerate(requests) if len(request.prompt_ids) > 1]
    prompts = [requests[index].prompt_ids[:-1] for index in order]
    documents = [Document.from_lists(prompt, [IGNORE_INDEX] * len(prompt)) for prompt in prompts]
    device = model.weights.device
    for run in split_by_tokens([len(document.ids_L) for document in documents], PREFILL_TOKENS):
        members = order[run]
        lengths = [len(document.ids_L) for document in documents[run]]
        row_T = torch.from_numpy(np.repeat([start + index for index in members], lengths)).to(device)
        adapter_T = torch.from_numpy(np.repeat([float(not requests[index].base) for index in members], lengths))
        packed = pack(documents[run])
        staging.reserve(len(packed.ids_T))
        batch = staging.upload(packed, 1.0, packed.lengths)
        h_TD = model.embed(batch.ids_T)
        attention = _attention(model, cache, batch, row_T)
        model.forward(h_TD, adapter_T.to(device, h_TD.dtype)[:, None], attention)


def _attention(model: DecoderModel, cache: KVCache, batch: DeviceBatch, row_T: Tensor) -> Attention:
    position_T = batch.position_T.long()

    def attention(index: int, qkv_TC: Tensor) -> Tensor | None:
        layer = model.weights.layers[index]
        if layer.qk_norm is not None:
            model.ops.qk_norm(qkv_TC, layer.qk_norm, layer.shape, qkv_TC)
        if layer.rope is not None:
            model.ops.rope(qkv_TC, batch, model.rope[layer.rope], layer.shape)
        kv_TC = qkv_TC[:, layer.shape.heads * layer.shape.head_dim :]
        cache.layers[index][row_T, :, :, position_T] = kv_TC.unflatten(1, (2, layer.shape.kv_heads, -1))
        if index == len(model.weights.layers) - 1:  # nothing reads the last layer's output of these tokens
            return None
        out_TD = qkv_TC.new_empty(len(qkv_TC), layer.shape.heads * layer.shape.head_dim)
        model.ops.attention(qkv_TC, batch, layer.shape, out_TD)
        return out_TD

    return attention
