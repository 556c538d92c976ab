"""The forward and backward halves of a pass as CUDA graphs, one pair for each padded batch size.

A capture costs the host as much as a few passes cost the device. So the sizes that the data's steps will have are
captured before the first step, a few percent apart, and larger ones, which are rare, run without a graph. Where the
data's lengths are not known beforehand, a size replays the graph of the next larger one, until the padding spent there
has cost about as much as a capture of its own.

Only the number of rows is baked into a graph: documents, tokens and positions are read from the static buffer. The
head runs between the two graphs, so that the number of supervised rows needs no buckets; its few launches are issued
while the forward graph still runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from parley.train_step.graph_threshold import GraphThreshold
from parley.train_step.packed_batch import DeviceBatch, PackedBatch
from parley.units import round_up

if TYPE_CHECKING:
    from parley.train_step.fused_step import ForwardState, FusedStep, Head


logger = logging.getLogger(__name__)


@dataclass
class CapturedPass:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    state: ForwardState  # tensors at the addresses that both graphs use


CAPTURE_COST_TOKENS = 2048  # padding worth one capture, which takes an H200 the time of 5,000 tokens
SIZE_RATIO = 1.08  # between two sizes that are captured before the first step: half of it is padding in the mean
MAX_PADDING = 1.1  # a graph of at most so many times a pass's own tokens is as good as one of its own
RARE = 0.005  # share of the steps at either end for whose sizes nothing is captured


def graph_sizes(tokens_N: NDArray[np.integer], multiple: int, most: int) -> list[int]:
    """The sizes to capture for passes of `tokens_N`, the largest first: multiples of `multiple` of at most `most`."""
    smallest, largest = np.quantile(np.minimum(tokens_N, most), [RARE, 1 - RARE])
    sizes = [min(round_up(int(largest), multiple), most // multiple * multiple)]
    while sizes[-1] - multiple >= smallest:
        sizes.append(min(round_up(int(sizes[-1] / SIZE_RATIO), multiple), sizes[-1] - multiple))
    return [size for size in sizes if size > 0]


def is_deterministic() -> bool:
    """Whether a pass may depend on its documents alone, not on what was captured before it or on a time.

    The number of rows decides which kernels the libraries take, and so the last bits of a result. A resumed run has
    captured other sizes than the run that was not interrupted.
    """
    return torch.are_deterministic_algorithms_enabled()


class GraphSizes:
    """Chooses the graph size for a pass, a multiple of `pad_multiple`."""

    def __init__(self, pad_multiple: int) -> None:
        self.pad_multiple = pad_multiple
        self.padding: Counter[int] = Counter()  # tokens of padding spent so far, by the size that was padded
        self.prepared = False  # no further sizes are captured

    def choose(self, tokens: int, captured: Iterable[int]) -> int:
        exact = round_up(tokens, self.pad_multiple)
        if is_deterministic():
            return exact
        larger = min((size for size in captured if size >= exact), default=exact)
        if self.prepared or larger <= MAX_PADDING * exact:
            return larger
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
        if self.sizes.prepared:
            return tokens <= max(self.captured, default=0)
        pays = is_deterministic() or not self.threshold.is_known or self.threshold.pays(tokens)
        return tokens <= self.step.plan.graph_tokens and pays

    def clear(self) -> None:
        """Drop all graphs, because buffers that they read have moved. The pool is freed with the last of them."""
        self.captured.clear()
        self.sizes.prepared = False
        self.pool = torch.cuda.graph_pool_handle()

    def prepare(self, tokens_N: NDArray[np.integer]) -> None:
        """Before the first step, whose passes will have `tokens_N`: measure the threshold, capture sizes up to it.

        The passes that are run and captured here are of dummy documents: gradients and metrics are overwritten.
        """
        if is_deterministic():
            return
        sizes = graph_sizes(tokens_N, self.step.plan.pad_multiple, self.step.plan.graph_tokens)
        while sizes and not self.threshold.is_known:
            batch = self.step.upload_dummy(sizes[len(sizes) // 2], graphed=True)
            self.threshold.run(batch.tokens, partial(self.step.run_eager, batch))
        for size in sizes:  # the largest first, whose memory the others share
            if self.threshold.pays(size):
                self.captured[size] = self._capture(self.step.upload_dummy(size, graphed=True))
        self.sizes.prepared = True
        logger.info("CUDA graphs: %d sizes of up to %d tokens", len(self.captured), max(self.captured, default=0))

    def run(self, batch: DeviceBatch, head: Head) -> None:
        """Forward, `head` and backward of `batch`, whose tensors are views of the static buffer."""
        if not self.threshold.is_known and not is_deterministic():
            self.threshold.run(batch.tokens, lambda: self.step.run_eager(batch, head))
            return
        captured = self.captured.get(batch.tokens)
        if captured is None:
            captured = self.captured[batch.tokens] = self._capture(batch)
        captured.forward.replay()
        head(batch, captured.state)
        captured.backward.replay()

    def forward(self, packed: PackedBatch) -> tuple[DeviceBatch, ForwardState] | None:
        """The forward half of a pass by a graph that was captured for training; None where there is none for its size.

        Not with dropout, which the graph has, nor where a pass may not depend on what was captured.
        """
        tokens = len(packed.ids_T)
        size = min((size for size in self.captured if size >= tokens), default=None)
        if size is None or self.step.bound.has_dropout or is_deterministic():
            return None
        batch = self.step.upload(packed, 1.0, size, graphed=True)
        captured = self.captured.get(size)  # a buffer that had to move has dropped them
        if captured is None:
            return None
        captured.forward.replay()
        return batch, captured.state

    def _capture(self, batch: DeviceBatch) -> CapturedPass:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self.pool, capture_error_mode="thread_local"):
            state = self.step.forward(batch)
        with torch.cuda.graph(backward, pool=self.pool, capture_error_mode="thread_local"):
            self.step.backward(batch, state)
        return CapturedPass(forward, backward, state)
