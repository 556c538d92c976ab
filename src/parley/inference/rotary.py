"""Rotary position embeddings of whole rows of queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from parley.train_step.ops import AttentionShape, RopeTable


class QkvRotary:
    """Cosines and signed sines laid out for all heads, so that x cos + roll(x) sin rotates queries and keys at once.

    Values are multiplied by one and pass unchanged. Shapes below: H = query, key and value heads together.
    """

    def __init__(self, rope: RopeTable, shapes: list[AttentionShape]) -> None:
        self.shapes = list(dict.fromkeys(shapes))  # mostly one; some families alternate between two
        self.shape_of_layer = [self.shapes.index(shape) for shape in shapes]
        self.tables = [_table(rope, shape) for shape in self.shapes]

    def gather(self, position_T: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines (T, H, E) at these positions, for each of `shapes`."""
        if len(position_T) == 1:  # a view costs less than a gather
            index = int(position_T)
            return [(cos[index : index + 1], sin[index : index + 1]) for cos, sin in self.tables]
        return [(cos.index_select(0, position_T), sin.index_select(0, position_T)) for cos, sin in self.tables]

    def rotate(self, layer: int, qkv_TC: Tensor, gathered: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The layer's heads, rotated: (T, H, E), queries before keys before values."""
        cos_THE, sin_THE = gathered[self.shape_of_layer[layer]]
        x_THE = qkv_TC.view(cos_THE.shape)
        return torch.addcmul(x_THE * cos_THE, x_THE.roll(cos_THE.shape[2] // 2, -1), sin_THE)


def _table(rope: RopeTable, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of all positions and heads, (L, H, E)."""
    cos_LHE = rope.cos_LE.new_ones(len(rope.cos_LE), shape.heads + 2 * shape.kv_heads, shape.head_dim)
    sin_LHE = torch.zeros_like(cos_LHE)
    cos_LHE[:, : -shape.kv_heads] = torch.cat([rope.cos_LE, rope.cos_LE], dim=1)[:, None]
    sin_LHE[:, : -shape.kv_heads] = torch.cat([-rope.sin_LE, rope.sin_LE], dim=1)[:, None]
    return cos_LHE, sin_LHE
