"""Rotary position embeddings of whole rows of queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from parley.train_step.bind import LayerWeights
from parley.train_step.ops import AttentionShape, RopeTable


class QkvRotary:
    """Cosines and signed sines laid out for all heads, so that x cos + roll(x) sin rotates queries and keys at once.

    Values are multiplied by one and pass unchanged. Shapes below: H = query, key and value heads together; the last
    dimension has the rotated elements of a head alone.
    """

    def __init__(self, ropes: dict[str, RopeTable], layers: list[LayerWeights]) -> None:
        kinds = [(layer.shape, layer.rope) for layer in layers]
        self.kinds = list(dict.fromkeys(kinds))  # mostly one; some families alternate between two
        self.kind_of_layer = [self.kinds.index(kind) for kind in kinds]
        self.tables = [None if rope is None else _table(ropes[rope], shape) for shape, rope in self.kinds]

    def gather(self, position_T: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Cosines and sines (T, H, E) at these positions, for each of `kinds`; None for one without rotation."""
        if len(position_T) == 1:  # a view costs less than a gather
            at = slice(int(position_T), int(position_T) + 1)
            return [table and (table[0][at], table[1][at]) for table in self.tables]
        return [
            table and (table[0].index_select(0, position_T), table[1].index_select(0, position_T))
            for table in self.tables
        ]

    def rotate(self, layer: int, qkv_TC: Tensor, gathered: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        """The layer's heads, rotated: (T, H, E), queries before keys before values."""
        kind = self.kind_of_layer[layer]
        head_dim, table = self.kinds[kind][0].head_dim, gathered[kind]
        x_THE = qkv_TC.view(len(qkv_TC), -1, head_dim)
        if table is None:
            return x_THE
        cos_THE, sin_THE = table
        rotated = cos_THE.shape[2]
        if rotated < head_dim:
            return torch.cat([_rotate(x_THE[..., :rotated], cos_THE, sin_THE), x_THE[..., rotated:]], dim=2)
        return _rotate(x_THE, cos_THE, sin_THE)


def _rotate(x_THE: Tensor, cos_THE: Tensor, sin_THE: Tensor) -> Tensor:
    return torch.addcmul(x_THE * cos_THE, x_THE.roll(cos_THE.shape[2] // 2, -1), sin_THE)


def _table(rope: RopeTable, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of all positions and heads, (L, H, E)."""
    positions, half = rope.cos_LE.shape
    cos_LHE = rope.cos_LE.new_ones(positions, shape.heads + 2 * shape.kv_heads, 2 * half)
    sin_LHE = torch.zeros_like(cos_LHE)
    cos_LHE[:, : -shape.kv_heads] = torch.cat([rope.cos_LE, rope.cos_LE], dim=1)[:, None]
    sin_LHE[:, : -shape.kv_heads] = torch.cat([-rope.sin_LE, rope.sin_LE], dim=1)[:, None]
    return cos_LHE, sin_LHE
