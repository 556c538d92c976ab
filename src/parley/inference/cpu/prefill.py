"""New prompts on a CPU: one pass that fills the cache and gives the logits after each prompt.

A token's small operations cost as much as its products there, so this pass does what `forward.prefill` does in fewer of
them: documents attend one by one on views of the pack, and the last layer goes on with the last token of each alone.
What stands in the cache already is not read again.

Shape suffixes: T tokens of the pack, N documents, L tokens of one, D hidden, C query, key and value columns, H heads,
K key-value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from parley.data.packing import split_by_tokens
from parley.inference.kv_cache import Cache
from parley.inference.model import PREFILL_TOKENS, Voices
from parley.inference.prefix_cache import Kept
from parley.train_step.matmul import ONEDNN_ROW_MULTIPLE
from parley.train_step.ops import AttentionShape
from parley.train_step.qk_norm import apply_qk_norm


class Reader:
    """Reads whole prompts, their last tokens included.

    `kept` is told what is drawn after them and which rows are moved.
    """

    def __init__(self, voices: Voices, cache: Cache) -> None:
        self.voices, self.cache, self.turns = voices, cache, voices.both.turns
        self.kept = Kept(len(cache.layers[0]))

    def __call__(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], tuned: Sequence[bool]) -> Tensor:
        """fp32 logits (N, V) after each prompt, whose keys and values are then in its row of the cache."""
        known = [self._recall(*place) for place in zip(rows, prompts, tuned, strict=True)]
        lengths = [len(prompt) - count for prompt, count in zip(prompts, known, strict=True)]
        runs = split_by_tokens(lengths, PREFILL_TOKENS)
        logits = [self._pass(prompts[run], rows[run], tuned[run], known[run]) for run in runs]
        for place in zip(rows, prompts, tuned, strict=True):
            self.kept.read(*place)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _recall(self, row: int, prompt: Sequence[int], tuned: bool) -> int:
        """How many of the prompt's tokens stand in `row` of the cache, once copied from where most of them stand."""
        source, count = self.kept.most_alike(prompt, tuned)
        if count and source != row:
            self.cache.move(source, row, count)
        self.kept.read(row, prompt[:count], tuned)
        return count

    def _pass(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], tuned: Sequence[bool], known: Sequence[int]
    ) -> Tensor:
        """The first `known` tokens of each prompt are in its row."""
        model = self.voices.for_rows(tuned)
        weights = model.weights
        prompts = [prompt[count:] for prompt, count in zip(prompts, known, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        bounds = [0, *accumulate(lengths)]
        more = -bounds[-1] % ONEDNN_ROW_MULTIPLE  # rows that nobody reads
        spans = [(count, count + length) for count, length in zip((*known, 0), (*lengths, more), strict=True)]
        position_T = torch.cat([torch.arange(*span) for span in spans])
        last_N = torch.tensor(bounds[1:]) - 1
        tuned_N1 = torch.tensor([[float(one)] for one in tuned], dtype=weights.dtype)
        tuned_T1 = torch.cat([tuned_N1, tuned_N1[:1]]).repeat_interleave(torch.tensor([*lengths, more]), 0)
        ids_T = torch.tensor([token for prompt in (*prompts, [0] * more) for token in prompt])
        turned = self.turns.at(position_T)

        def attend(index: int, qkv_TC: Tensor) -> Tensor:
            layer, shape = weights.layers[index], weights.layers[index].shape
            if layer.qk_norm is not None:
                qkv_TC = apply_qk_norm(qkv_TC, shape, layer.qk_norm)
            x_THE = self.turns.turn(index, qkv_TC, turned)
            is_last = index == len(weights.layers) - 1
            out_TD = qkv_TC.new_zeros(len(lengths) if is_last else len(qkv_TC), shape.heads * shape.head_dim)
            for place, (row, (start, end)) in enumerate(zip(rows, pairwise(bounds), strict=True)):
                x_HLE, (before, until) = x_THE[start:end].transpose(0, 1), spans[place]
                cached_2KLE = self.cache.layers[index][row, :, :, :until]
                cached_2KLE[:, :, before:].copy_(x_HLE[shape.heads :].unflatten(0, (2, shape.kv_heads)))
                asked = slice(place, place + 1) if is_last else slice(start, end)
                q_HLE = x_HLE[: shape.heads, -1:] if is_last else x_HLE[: shape.heads]
                out_LHE = out_TD[asked].view(-1, shape.heads, shape.head_dim)
                out_LHE.copy_(_attention(q_HLE, cached_2KLE, shape).transpose(0, 1))
            return out_TD

        h_TD = weights.embedding_VD.index_select(0, ids_T)
        last = len(weights.layers) - 1
        model.layers(h_TD, tuned_T1, attend, until=last)
        attended_ND = attend(last, model.queries(last, h_TD, tuned_T1))
        h_ND = h_TD.index_select(0, last_N)
        model.finish(last, h_ND, attended_ND, tuned_N1)
        return model.logits(h_ND)


def _attention(q_HLE: Tensor, cached_2KLE: Tensor, shape: AttentionShape) -> Tensor:
    """What the queries of the last positions of one document see of it, (H, L, E)."""
    asked, length = q_HLE.shape[1], cached_2KLE.shape[2]
    windowed = shape.window is not None and shape.window < length
    mask_LL = None
    if windowed or 1 < asked < length:
        at_L1, seen_L = torch.arange(length - asked, length)[:, None], torch.arange(length)
        mask_LL = seen_L <= at_L1
        if shape.window is not None:
            mask_LL &= seen_L > at_L1 - shape.window
    keys_KLE, values_KLE = cached_2KLE.unbind()
    return functional.scaled_dot_product_attention(
        q_HLE[None], keys_KLE[None], values_KLE[None], mask_LL, is_causal=mask_LL is None and asked > 1,
        scale=shape.scale, enable_gqa=True,
    )[0]  # fmt: skip
