"""One pass through the decoder layers: over the packed prompts of new answers, or over the next token of each row.

Shape suffixes: T rows of the pass (tokens of a pack, or one token of each of B answers), D hidden, F feed-forward,
C query, key and value columns, H heads, K key-value heads, G heads that share one, E head size, L positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from parley.data.packing import Document, split_by_tokens
from parley.data.tokens import IGNORE_INDEX
from parley.inference.kv_cache import Cache
from parley.inference.linear import LayerProducts, Product
from parley.inference.slot_state import POSITION, TOKEN, TUNED, State
from parley.train_step.bind import ModelWeights
from parley.train_step.ops import AttentionShape, Ops, RopeTable
from parley.train_step.packed_batch import DeviceBatch, StagingBuffer, pack
from parley.train_step.qk_norm import apply_qk_norm

PREFILL_TOKENS = 8192  # of one pass over new prompts

Attend = Callable[[int, Tensor], Tensor | None]  # from a layer's index and its q, k, v to the heads' outputs


@dataclass
class Model:
    """Everything of the model that answering reads."""

    weights: ModelWeights
    products: list[LayerProducts]
    head: Product
    rope: RopeTable
    ops: Ops
    eps_11: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.eps_11 = torch.full((1, 1), self.weights.eps, dtype=torch.float32, device=self.weights.device)
        assert all(layer.eps == self.weights.eps for layer in self.weights.layers)

    @cached_property
    def turns(self) -> Turns:
        return Turns(self.rope, [layer.shape for layer in self.weights.layers])

    def layers(self, h_TD: Tensor, tuned_T1: Tensor, attend: Attend, until: int | None = None) -> None:
        """Add the output of the layers before `until` to `h_TD`, in place; stops where `attend` returns None."""
        for index in range(len(self.products) if until is None else until):
            attended_TD = attend(index, self.queries(index, h_TD, tuned_T1))
            if attended_TD is None:
                return
            self.finish(index, h_TD, attended_TD, tuned_T1)

    def queries(self, index: int, h_TD: Tensor, tuned_T1: Tensor) -> Tensor:
        """Queries, keys and values of a layer, (T, C)."""
        return self.products[index].qkv(self._norm(h_TD, self.weights.layers[index].input_norm_D), tuned_T1)

    def finish(self, index: int, h_TD: Tensor, attended_TD: Tensor, tuned_T1: Tensor) -> None:
        """Add to `h_TD` what a layer makes of its heads' outputs, in place."""
        products = self.products[index]
        products.o.add_to(h_TD, attended_TD, tuned_T1)
        gate_up_T2F = products.gate_up(self._norm(h_TD, self.weights.layers[index].post_attention_norm_D), tuned_T1)
        act_TF = gate_up_T2F.new_empty(gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2)
        self.ops.swiglu(gate_up_T2F, act_TF)
        products.down.add_to(h_TD, act_TF, tuned_T1)

    def logits(self, h_TD: Tensor) -> Tensor:
        """fp32, (T, V)."""
        normed_TD = self._norm(h_TD, self.weights.norm_D)
        return self.head(normed_TD, normed_TD[:, :1]).float()  # the head has no adapter to switch

    def _norm(self, x_TD: Tensor, weight_D: Tensor) -> Tensor:
        if x_TD.is_cuda:
            out_TD = torch.empty_like(x_TD)
            self.ops.rms_norm(x_TD, None, weight_D, self.weights.eps, out_TD)
            return out_TD
        if x_TD.dtype != torch.float32:
            return functional.rms_norm(x_TD, weight_D.shape, weight_D, self.weights.eps)
        # The same in five calls, which take 5 microseconds where PyTorch's function takes 8.
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        square_T1 = torch.addcmul(self.eps_11, length_T1, length_T1, value=1 / x_TD.shape[1])
        return square_T1.rsqrt_().mul(x_TD).mul_(weight_D)


def prefill(
    model: Model, cache: Cache, staging: StagingBuffer, prompts: Sequence[Sequence[int]], rows: Sequence[int],
    tuned: Sequence[bool],
) -> None:  # fmt: skip
    """Write the keys and values of each prompt, but for its last token, into its row of the cache.

    The last token is the first that decoding reads, so the passes here need no head. Prompts are packed end to end
    without padding, up to PREFILL_TOKENS a pass.
    """
    order = [index for index, prompt in enumerate(prompts) if len(prompt) > 1]
    documents = [
        Document.from_lists(prompts[index][:-1], [IGNORE_INDEX] * (len(prompts[index]) - 1)) for index in order
    ]
    device = model.weights.device
    for run in split_by_tokens([len(document.ids_L) for document in documents], PREFILL_TOKENS):
        members = order[run]
        lengths = [len(document.ids_L) for document in documents[run]]
        row_T = torch.from_numpy(np.repeat([rows[index] for index in members], lengths)).to(device)
        tuned_T = torch.from_numpy(np.repeat([float(tuned[index]) for index in members], lengths))
        packed = pack(documents[run])
        staging.reserve(len(packed.ids_T))
        on_device = staging.upload(packed, 1.0, packed.lengths)
        h_TD = model.weights.embedding_VD.index_select(0, on_device.ids_T)
        attend = _attend_in_pack(model, cache, on_device, row_T)
        model.layers(h_TD, tuned_T.to(device, h_TD.dtype)[:, None], attend)


def _attend_in_pack(model: Model, cache: Cache, rows: DeviceBatch, row_T: Tensor) -> Attend:
    position_T = rows.position_T.long()

    def attend(index: int, qkv_TC: Tensor) -> Tensor | None:
        layer = model.weights.layers[index]
        if layer.qk_norm is not None:
            qkv_TC = apply_qk_norm(qkv_TC, layer.shape, layer.qk_norm)
        model.ops.rope(qkv_TC, rows, model.rope, layer.shape)
        kv_TC = qkv_TC[:, layer.shape.heads * layer.shape.head_dim :]
        cache.layers[index][row_T, :, :, position_T] = kv_TC.unflatten(1, (2, layer.shape.kv_heads, -1))
        if index == len(model.weights.layers) - 1:  # what it would say of the prompt's tokens nobody asks
            return None
        attended_TD = qkv_TC.new_empty(len(qkv_TC), layer.shape.heads * layer.shape.head_dim)
        model.ops.attention(qkv_TC, rows, layer.shape, attended_TD)
        return attended_TD

    return attend


@dataclass(frozen=True)
class Voices:
    """A model for rows of both voices, and for rows that are all of one: without or with its adapter."""

    both: Model
    base: Model
    tuned: Model

    @classmethod
    def of(cls, model: Model) -> Voices:
        """With the adapter merged into copies where a CPU keeps such; else one model is all three."""
        if model.head.packed is None:
            return cls(model, model, model)
        base, tuned = (
            replace(model, products=[layer.in_voice(tuned=tuned) for layer in model.products])
            for tuned in (False, True)
        )
        return cls(model, base, tuned)

    def for_rows(self, tuned: Sequence[bool]) -> Model:
        if all(tuned):
            return self.tuned
        return self.both if any(tuned) else self.base


class Turns:
    """Rotary embeddings of whole rows of queries, keys and values.

    Cosines and signed sines are laid out for all heads, so that x cos + roll(x) sin turns both halves of queries and
    keys; values pass unturned.
    """

    def __init__(self, rope: RopeTable, shapes: list[AttentionShape]) -> None:
        self.shapes = list(dict.fromkeys(shapes))  # mostly one, in some families two
        self.kinds = [self.shapes.index(shape) for shape in shapes]
        self.tables = [_turns(rope, shape) for shape in self.shapes]

    def at(self, position_T: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines (T, H, E) of each of `shapes`."""
        if len(position_T) == 1:  # a view costs less than a gather
            place = int(position_T)
            return [(cos_PHE[place : place + 1], sin_PHE[place : place + 1]) for cos_PHE, sin_PHE in self.tables]
        return [(cos.index_select(0, position_T), sin.index_select(0, position_T)) for cos, sin in self.tables]

    def turn(self, index: int, qkv_TC: Tensor, turns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Layer `index`'s heads, turned: (T, H, E) with queries, keys and values in this order."""
        cos_THE, sin_THE = turns[self.kinds[index]]
        x_THE = qkv_TC.view(cos_THE.shape)
        return torch.addcmul(x_THE * cos_THE, x_THE.roll(cos_THE.shape[2] // 2, -1), sin_THE)


class PlainStep:
    """The logits that follow one token of each row, in plain PyTorch."""

    def __init__(self, voices: Voices, cache: Cache) -> None:
        self.voices, self.cache, self.turns = voices, cache, voices.both.turns

    def __call__(self, state: State) -> Tensor:
        """fp32 logits (B, V) after each row's token. `state` lies on the host."""
        model = self.voices.for_rows(state.real(TUNED).tolist())
        weights, kinds = model.weights, self.turns.kinds
        device, rows = weights.device, state.fields_BF.shape[0]
        position_B = state.whole(POSITION).long()
        turns = self.turns.at(position_B.to(device))
        longest = int(state.whole(POSITION).numpy().max()) + 1
        masks = [_mask(position_B.to(device), longest, shape, weights.dtype) for shape in self.turns.shapes]
        row_B, at_B = torch.arange(rows, device=device), position_B.to(device)

        def attend(index: int, qkv_BC: Tensor) -> Tensor:
            layer, shape, cached = weights.layers[index], weights.layers[index].shape, self.cache.layers[index]
            if layer.qk_norm is not None:
                qkv_BC = apply_qk_norm(qkv_BC, shape, layer.qk_norm)
            x_BHE = self.turns.turn(index, qkv_BC, turns)
            kv_B2KE = x_BHE[:, shape.heads :].view(rows, 2, shape.kv_heads, shape.head_dim)
            if rows == 1:
                cached[0, :, :, longest - 1].copy_(kv_B2KE[0])
            else:
                cached[row_B, :, :, at_B] = kv_B2KE
            # Heads that share keys stand as several queries of one head, so that nothing is repeated.
            q_BKGE = x_BHE[:, : shape.heads].view(rows, shape.kv_heads, -1, shape.head_dim)
            keys, values = cached[:rows, 0, :, :longest], cached[:rows, 1, :, :longest]
            mask = masks[kinds[index]]
            out_BKGE = functional.scaled_dot_product_attention(q_BKGE, keys, values, mask, scale=shape.scale)
            return out_BKGE.reshape(rows, -1)

        h_BD = weights.embedding_VD.index_select(0, state.whole(TOKEN).to(device))
        model.layers(h_BD, state.real(TUNED)[:, None].to(device, h_BD.dtype), attend)
        return model.logits(h_BD)


def _turns(rope: RopeTable, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of all positions and heads, (P, H, E)."""
    cos_PHE = rope.cos_LE.new_ones(len(rope.cos_LE), shape.heads + 2 * shape.kv_heads, shape.head_dim)
    sin_PHE = torch.zeros_like(cos_PHE)
    cos_PHE[:, : -shape.kv_heads] = torch.cat([rope.cos_LE, rope.cos_LE], dim=1)[:, None]
    sin_PHE[:, : -shape.kv_heads] = torch.cat([-rope.sin_LE, rope.sin_LE], dim=1)[:, None]
    return cos_PHE, sin_PHE


def _mask(position_B: Tensor, longest: int, shape: AttentionShape, dtype: torch.dtype) -> Tensor | None:
    """Minus infinity where a row's query does not see a cached position, (B, 1, 1, L); None where all see all."""
    if position_B.shape[0] == 1 and shape.window is None:
        return None
    at_L = torch.arange(longest, device=position_B.device)
    hidden_BL = at_L > position_B[:, None]
    if shape.window is not None:
        hidden_BL |= at_L <= position_B[:, None] - shape.window
    return torch.zeros_like(hidden_BL, dtype=dtype).masked_fill_(hidden_BL, -torch.inf)[:, None, None]
