"""The forward and backward halves of a pass as CUDA graphs, one pair for each padded batch size.

A capture costs the host as much as a few passes cost the device. So a rare size replays the graph of the next larger
one, until the padding spent there has cost about as much as a capture of its own.

Only the number of rows is baked into a graph: documents, tokens and positions are read from the static buffer. The
head runs between the two graphs, so that the number of supervised rows needs no buckets; its few launches are issued
while the forward graph still runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parley.train_step.graph_threshold import GraphThreshold
from parley.train_step.packed_batch import DeviceBatch
from parley.units import round_up

if TYPE_CHECKING:
    from parley.train_step.fused_step import ForwardState, FusedStep, Head


@dataclass
class CapturedPass:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    state: ForwardState  # tensors at the addresses that both graphs use


CAPTURE_COST_TOKENS = 2048  # padding worth one capture, which takes an H200 the time of 5,000 tokens


class GraphSizes:
    """Chooses the graph size for a pass, a multiple of `pad_multiple`."""

    def __init__(self, pad_multiple: int) -> None:
        self.pad_multiple = pad_multiple
        self.padding: Counter[int] = Counter()  # tokens of padding spent so far, by the size that was padded

    def choose(self, tokens: int, captured: Iterable[int]) -> int:
        exact = round_up(tokens, self.pad_multiple)
        larger = min((size for size in captured if size >= exact), default=exact)
        if self.padding[exact] + larger - exact > CAPTURE_COST_TOKENS:
            return exact
        self.padding[exact] += larger - exact
        return larger


class GraphRunner:
    """Captures a size when it is worth it and replays from then on. All graphs share one memory pool."""

    def __init__(self, step: FusedStep) -> None:
        self.step = step
        self.captured: dict[int, CapturedPass] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.threshold = GraphThreshold(step.bound.device)
        self.sizes = GraphSizes(step.plan.pad_multiple)

    def tokens_for(self, tokens: int) -> int:
        """The graph size that a pass of `tokens` is padded to."""
        return self.sizes.choose(tokens, self.captured)

    def takes(self, tokens: int) -> bool:
        """Whether a pass of `tokens` comes here: while that is being measured, and where it pays."""
        return tokens <= self.step.plan.graph_tokens and (not self.threshold.is_known or self.threshold.pays(tokens))

    def clear(self) -> None:
        """Drop all graphs, because buffers that they read have moved. The pool is freed with the last of them."""
        self.captured.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, batch: DeviceBatch, head: Head) -> None:
        """Forward, `head` and backward of `batch`, whose tensors are views of the static buffer."""
        if not self.threshold.is_known:
            self.threshold.run(batch.tokens, lambda: self.step.run_eager(batch, head))
            return
        captured = self.captured.get(batch.tokens)
        if captured is None:
            captured = self.captured[batch.tokens] = self._capture(batch)
        captured.forward.replay()
        head(batch, captured.state)
        captured.backward.replay()

    def _capture(self, batch: DeviceBatch) -> CapturedPass:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self.pool, capture_error_mode="thread_local"):
            state = self.step.forward(batch)
        with torch.cuda.graph(backward, pool=self.pool, capture_error_mode="thread_local"):
            self.step.backward(batch, state)
        return CapturedPass(forward, backward, state)
