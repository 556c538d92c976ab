"""Prefill of new prompts in one packed pass that ends with the logits after each prompt.

What the KV cache already holds of a prompt is not computed again (see prefix_cache). The last layer computes the
last token of each prompt alone, since nothing reads the outputs of the others.

Shape suffixes besides docs/design.md's: J prompts of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from parley.data.packing import split_by_tokens
from parley.inference.cpu.attention import attend
from parley.inference.cpu.prefix_cache import PrefixCache
from parley.inference.cpu.step import adapter_rows
from parley.inference.interface import DecodeRequest
from parley.inference.kv_cache import KVCache
from parley.inference.model import DecoderModel
from parley.inference.rotary import QkvRotary
from parley.train_step.matmul import ONEDNN_ROW_MULTIPLE
from parley.train_step.ops import AttentionShape

PREFILL_TOKENS = 8192  # of one pass: bounds the memory of its activations


class Prefill:
    """Computes the keys and values of whole prompts, as far as `prefixes` does not say that the cache has them."""

    def __init__(self, model: DecoderModel, cache: KVCache, rotary: QkvRotary, prefixes: PrefixCache) -> None:
        self.model, self.cache, self.rotary, self.prefixes = model, cache, rotary, prefixes

    def __call__(self, requests: Sequence[DecodeRequest], start: int) -> Tensor:
        """fp32 logits (J, V) after each prompt, whose keys and values are then in the rows from `start` on."""
        rows = range(start, start + len(requests))
        known = [self._reuse(row, request) for row, request in zip(rows, requests, strict=True)]
        lengths = [len(request.prompt_ids) - count for request, count in zip(requests, known, strict=True)]
        runs = split_by_tokens(lengths, PREFILL_TOKENS)
        logits = [self._forward(requests[run], rows[run], known[run]) for run in runs]
        for row, request in zip(rows, requests, strict=True):
            self.prefixes.set(row, request.prompt_ids, not request.base)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _reuse(self, row: int, request: DecodeRequest) -> int:
        """How many of the prompt's tokens `row` holds, after they were copied from the row with the longest match."""
        source, count = self.prefixes.longest_match(request.prompt_ids, not request.base)
        if count and source != row:
            self.cache.move(source, row, count)
        self.prefixes.set(row, request.prompt_ids[:count], not request.base)
        return count

    def _forward(self, requests: Sequence[DecodeRequest], rows: Sequence[int], known: Sequence[int]) -> Tensor:
        """fp32 logits (J, V). The first `known` tokens of each prompt are in its row."""
        weights, device = self.model.weights, self.model.weights.device
        ids = [list(request.prompt_ids[count:]) for request, count in zip(requests, known, strict=True)]
        ends = list(accumulate(map(len, ids)))
        spans = [(count, count + len(new)) for count, new in zip(known, ids, strict=True)]  # positions in the rows
        # oneDNN compiles a kernel for each number of rows, 0.2 to 0.6 ms each: padding rows keep the numbers few.
        padding = -ends[-1] % ONEDNN_ROW_MULTIPLE
        position_T = torch.cat([*(torch.arange(*span) for span in spans), torch.zeros(padding).long()]).to(device)
        ids_T = torch.tensor([token for new in (*ids, [0] * padding) for token in new], device=device)
        adapter_J1 = torch.tensor([[float(not request.base)] for request in requests])
        count_J = torch.tensor([*map(len, ids[:-1]), len(ids[-1]) + padding])
        adapter_T1 = adapter_J1.repeat_interleave(count_J, 0).to(device, weights.dtype)
        rotary_at_positions = self.rotary.gather(position_T)
        last = len(weights.layers) - 1

        def attention(index: int, qkv_TC: Tensor) -> Tensor:
            layer, shape = weights.layers[index], weights.layers[index].shape
            if layer.qk_norm is not None:
                self.model.ops.qk_norm(qkv_TC, layer.qk_norm, shape, qkv_TC)
            x_THE = self.rotary.rotate(index, qkv_TC, rotary_at_positions)
            out_TD = qkv_TC.new_zeros(len(ids) if index == last else len(qkv_TC), shape.heads * shape.head_dim)
            for j, (row, (first, end)) in enumerate(zip(rows, pairwise([0, *ends]), strict=True)):
                x_HLE, (begin, until) = x_THE[first:end].transpose(0, 1), spans[j]
                cached_2GLE = self.cache.layers[index][row, :, :, :until]
                cached_2GLE[:, :, begin:].copy_(x_HLE[shape.heads :].unflatten(0, (2, shape.kv_heads)))
                out_rows = slice(j, j + 1) if index == last else slice(first, end)
                q_HLE = x_HLE[: shape.heads, -1:] if index == last else x_HLE[: shape.heads]
                out_LHE = out_TD[out_rows].view(-1, shape.heads, shape.head_dim)
                out_LHE.copy_(_attention(q_HLE, cached_2GLE, shape).transpose(0, 1))
            return out_TD

        h_TD = self.model.embed(ids_T)
        self.model.forward(h_TD, adapter_rows(adapter_T1), attention, until=last)
        out_JD = attention(last, self.model.qkv(last, h_TD, adapter_rows(adapter_T1)))
        h_JD = h_TD[[end - 1 for end in ends]]
        self.model.add_output(last, h_JD, out_JD, adapter_rows(adapter_J1.to(device, weights.dtype)))
        return self.model.logits(h_JD)


def _attention(q_HLE: Tensor, cached_2GLE: Tensor, shape: AttentionShape) -> Tensor:
    """Causal attention of the queries of a prompt's last positions over its keys and values, (H, L, E)."""
    queries, length = q_HLE.shape[1], cached_2GLE.shape[2]
    windowed = shape.window is not None and shape.window < length
    mask = None
    if windowed or 1 < queries < length:  # `causal` aligns the first query with the first key, not the last ones
        query_L1 = torch.arange(length - queries, length, device=q_HLE.device)[:, None]
        key_L = torch.arange(length, device=q_HLE.device)
        visible_LL = key_L <= query_L1
        if shape.window is not None:
            visible_LL &= key_L > query_L1 - shape.window
        mask = torch.zeros_like(visible_LL, dtype=q_HLE.dtype).masked_fill_(~visible_LL, -torch.inf)
    # Query heads that share a key head are a batch of their own, with that head's keys expanded.
    q_GJLE = q_HLE.unflatten(0, (shape.kv_heads, -1))
    k_GJLE, v_GJLE = (x_GLE[:, None].expand(-1, q_GJLE.shape[1], -1, -1) for x_GLE in cached_2GLE.unbind())
    return attend(q_GJLE, k_GJLE, v_GJLE, shape, mask, causal=mask is None and queries > 1).flatten(0, 1)
