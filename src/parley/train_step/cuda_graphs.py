"""The forward and backward halves of a pass as CUDA graphs, one pair for each size of row.

A capture takes the host as long as a few passes take the device. So a size that comes seldom goes through the graph of
the next larger one, until the rows it wasted there have cost about as much as a graph of its own.

Only the number of rows is baked into a graph: documents, tokens and positions are read from the static buffer. The
head stays outside, so that the count of supervised tokens needs no buckets; its few launches are issued while the
forward half still runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parley.train_step.matmul import whole
from parley.train_step.packed_batch import Rows

if TYPE_CHECKING:
    from parley.train_step.fused_step import FusedStep, Middle


@dataclass
class Pair:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    middle: Middle


WASTE = 2048  # rows that a size may waste in larger graphs; an H200 takes 5,000 in the time of a capture


class Sizes:
    """Which size of graph a pass goes through, a multiple of `granule`."""

    def __init__(self, granule: int) -> None:
        self.granule = granule
        self.wasted: Counter[int] = Counter()  # rows, by the size that they were added to

    def choose(self, tokens: int, captured: Iterable[int]) -> int:
        own = whole(tokens, self.granule)
        larger = min((size for size in captured if size >= own), default=own)
        if self.wasted[own] + larger - own > WASTE:
            return own
        self.wasted[own] += larger - own
        return larger


class Graphs:
    """Captures a size when it is worth it and replays from then on. All graphs share one pool of memory."""

    def __init__(self, step: FusedStep) -> None:
        self.step = step
        self.pairs: dict[int, Pair] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.warm = False
        self.sizes = Sizes(step.plan.granule)

    def rows_for(self, tokens: int) -> int:
        """The size of graph that a pass of `tokens` goes through."""
        return self.sizes.choose(tokens, self.pairs)

    def clear(self) -> None:
        """Forget all graphs: what they read has moved. The pool goes with the last of them."""
        self.pairs.clear()
        self.pool = torch.cuda.graph_pool_handle()
        self.warm = False

    def run(self, rows: Rows) -> None:
        """Forward, head and backward of `rows`, which are views of the static buffer."""
        if not self.warm:  # libraries set themselves up, which no capture allows
            self.step.eager(rows)
            self.warm = True
            return
        pair = self.pairs.get(rows.tokens)
        if pair is None:
            pair = self.pairs[rows.tokens] = self._capture(rows)
        pair.forward.replay()
        self.step.head(rows, pair.middle)
        pair.backward.replay()

    def _capture(self, rows: Rows) -> Pair:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self.pool, capture_error_mode="thread_local"):
            middle = self.step.forward(rows)
        with torch.cuda.graph(backward, pool=self.pool, capture_error_mode="thread_local"):
            self.step.backward(rows, middle)
        return Pair(forward, backward, middle)
