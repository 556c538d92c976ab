"""Keys and values of running answers, one row of fixed length for each.

Shape suffixes: B rows, L positions, K key-value heads, E head size.
"""

from __future__ import annotations

import torch

from parley.train_step.ops import AttentionShape


class Cache:
    """`layers[i]` holds layer i's keys and values, (B, 2, K, L, E): each head of a row is one run of memory."""

    def __init__(
        self, shapes: list[AttentionShape], rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = [
            torch.zeros(rows, 2, shape.kv_heads, length, shape.head_dim, dtype=dtype, device=device) for shape in shapes
        ]

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` of one row to another."""
        for layer in self.layers:
            layer[target, :, :, :positions] = layer[source, :, :, :positions]
