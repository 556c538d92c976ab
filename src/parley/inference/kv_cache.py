"""The static KV cache: keys and values of running answers, one row of fixed length each."""

from __future__ import annotations

import torch

from parley.train_step.ops import AttentionShape


class KVCache:
    """`layers[i]` holds layer i's keys and values, (B, 2, G, L, E): each head of a row is contiguous in memory."""

    def __init__(
        self, shapes: list[AttentionShape], rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = [
            torch.zeros(rows, 2, shape.kv_heads, length, shape.head_dim, dtype=dtype, device=device) for shape in shapes
        ]

    @property
    def rows(self) -> int:
        return len(self.layers[0])

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` of one row to another."""
        # Only the filled positions: rows are as long as the context.
        for layer_B2GLE in self.layers:
            layer_B2GLE[target, :, :, :positions] = layer_B2GLE[source, :, :, :positions]
