"""A packed batch: documents laid end to end as one row of tokens, on the host and on the device.

Shape suffixes (legend in docs/design.md): T tokens of the row, S supervised rows, N documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parley.data.control_tokens import IGNORE_INDEX
from parley.data.packing import Document, with_weights
from parley.units import round_up

if TYPE_CHECKING:
    from parley.train_step.context_parallel import ContextLayout

ALIGNMENT = 4  # int32 elements: Triton specialises a kernel for 16-byte aligned pointers and compiles another otherwise
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class PackedBatch:
    """Documents end to end, on the host.

    `start_T` and `end_T` give, for each token, the first row of its document and the row after its last. The last
    `padding` tokens are none of a document's. `row_S` are the rows whose next token is supervised, `target_S` those
    tokens. `position_T` are rows of the rotary tables. `weight_S` are loss weights, None where all are 1.
    """

    ids_T: Ints
    position_T: Ints
    start_T: Ints
    end_T: Ints
    row_S: Ints
    target_S: Ints
    lengths: tuple[int, ...]
    weight_S: NDArray[np.float32] | None = None
    padding: int = 0

    def padded(self, tokens: int) -> PackedBatch:
        """The same documents in a row of `tokens`. Each padding token is an unsupervised document of its own."""
        padding = tokens - len(self.ids_T)
        assert padding >= 0, "a bucket holds its packed batch"
        # One document per padding token keeps attention finite there without a mask.
        row, zero = np.arange(len(self.ids_T), tokens, dtype=np.int32), np.zeros(padding, dtype=np.int32)
        return PackedBatch(
            np.concatenate([self.ids_T, zero]),
            np.concatenate([self.position_T, zero]),
            np.concatenate([self.start_T, row]),
            np.concatenate([self.end_T, row + 1]),
            self.row_S,
            self.target_S,
            self.lengths + (1,) * padding,
            self.weight_S,
            self.padding + padding,
        )

    def with_two_rope_rows(self, switch: int) -> PackedBatch:
        """For tables with two rows a position (ModelWeights): documents longer than `switch` take the second.

        Before `trimmed`, since the choice is by the whole length.
        """
        return replace(self, position_T=2 * self.position_T + (self.end_T - self.start_T > switch).astype(np.int32))

    def trimmed(self) -> PackedBatch:
        """Without the rows after each document's last supervised one: no loss depends on them (attention is causal)."""
        ends_N = np.cumsum(self.lengths)
        starts_N = ends_N - self.lengths
        last_N = np.concatenate([[-1], self.row_S])[np.searchsorted(self.row_S, ends_N)]
        kept_N = np.maximum(last_N + 1 - starts_N, 0)
        kept_T = np.arange(len(self.ids_T)) - self.start_T < np.repeat(kept_N, self.lengths)
        row_T = np.cumsum(kept_T, dtype=np.int32) - 1
        lengths_N = kept_N[kept_N > 0]
        return PackedBatch(
            self.ids_T[kept_T],
            self.position_T[kept_T],
            *_boundaries(lengths_N),
            row_T[self.row_S],
            self.target_S,
            tuple(lengths_N.tolist()),
            self.weight_S,
        )


def pack(documents: Iterable[Document]) -> PackedBatch:
    """Lay `documents` end to end."""
    documents = with_weights(list(documents))
    lengths_N = np.array([len(d.ids_L) for d in documents], dtype=np.int32)
    start_T, end_T = _boundaries(lengths_N)
    target_T = np.roll(np.concatenate([d.label_L for d in documents]), -1)
    target_T[np.cumsum(lengths_N) - 1] = IGNORE_INDEX  # no row predicts the first token of a document
    (row_S,) = np.nonzero(target_T != IGNORE_INDEX)
    weights = [d.weight_L for d in documents if d.weight_L is not None]
    return PackedBatch(
        np.concatenate([d.ids_L for d in documents]),
        np.arange(len(start_T), dtype=np.int32) - start_T,
        start_T,
        end_T,
        row_S.astype(np.int32),
        target_T[row_S],
        tuple(lengths_N.tolist()),
        # A row has the weight of the token after it, which it predicts.
        np.concatenate(weights)[row_S + 1] if weights else None,
    )


def _boundaries(lengths_N: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """For each token the first row of its document and the row after its last, both (T,)."""
    ends_N = np.cumsum(lengths_N, dtype=np.int32)
    return np.repeat(ends_N - lengths_N.astype(np.int32), lengths_N), np.repeat(ends_N, lengths_N)


@dataclass(frozen=True)
class DeviceBatch:
    """A packed batch on the device. Trailing rows, beyond the documents of `lengths`, are padding."""

    ids_T: Tensor
    position_T: Tensor
    start_T: Tensor
    end_T: Tensor
    row_S: Tensor
    target_S: Tensor
    scale: Tensor  # 0-dim fp32: one over the summed loss weights of the whole optimizer step
    seed: Tensor  # 0-dim int32, of the pass's dropout
    filled: Tensor  # 0-dim int32: tokens that are no padding
    lengths: tuple[int, ...] | None  # None under a CUDA graph, where only the device knows them
    weight_S: Tensor | None = None  # loss weights in fp32; not in the static copy, so not for a captured graph
    context: ContextLayout | None = None  # where the row is split over ranks, and these are the tokens of one
    runs: dict[bool, Any] = field(default_factory=dict, compare=False)  # of kernels/library_attention.py

    @property
    def tokens(self) -> int:
        return self.ids_T.shape[0]


class StagingBuffer:
    """One pinned host buffer and its device copy, so that a packed batch costs one transfer.

    CUDA graphs read the device copy at a fixed address; `reserve` reports when it had to move.
    """

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self.uploaded = torch.cuda.Event() if self.pinned else None
        self.host, self.static = self._allocate(tokens)

    def _allocate(self, tokens: int) -> tuple[Tensor, Tensor]:
        capacity = _capacity(tokens)
        host = torch.empty(capacity, dtype=torch.int32, pin_memory=self.pinned)
        return host, torch.empty(capacity, dtype=torch.int32, device=self.device)

    def reserve(self, tokens: int) -> bool:
        """Grow to a packed batch of `tokens`. True when the device copy moved: graphs that read it must be dropped."""
        if _capacity(tokens) <= self.host.numel():
            return False
        self.host, self.static = self._allocate(tokens)
        return True

    def upload(self, batch: PackedBatch, scale: float, lengths: tuple[int, ...] | None, seed: int = 0) -> DeviceBatch:
        """Copy `batch` to the device; the result's tensors are views of the static device copy."""
        parts = [
            np.array([np.float32(scale).view(np.int32), seed, len(batch.ids_T) - batch.padding], dtype=np.int32),
            *(batch.ids_T, batch.position_T, batch.start_T, batch.end_T, batch.row_S, batch.target_S),
        ]
        ends = list(accumulate(round_up(len(part), ALIGNMENT) for part in parts))
        assert ends[-1] <= self.host.numel(), "reserve comes before upload"
        if self.uploaded is not None:
            self.uploaded.synchronize()  # the previous asynchronous copy has finished reading the host buffer
        spans = [slice(begin, begin + len(part)) for begin, part in zip([0, *ends], parts, strict=False)]
        for span, part in zip(spans, parts, strict=True):
            self.host.numpy()[span] = part
        self.static[: ends[-1]].copy_(self.host[: ends[-1]], non_blocking=True)
        if self.uploaded is not None:
            self.uploaded.record()
        scalars_3, ids_T, position_T, start_T, end_T, row_S, target_S = (self.static[span] for span in spans)
        weight_S = None if batch.weight_S is None else torch.from_numpy(batch.weight_S).to(self.device)
        scale = scalars_3.view(torch.float32)[0]
        _, seed, filled = scalars_3
        rows = (row_S, target_S, scale, seed, filled)
        return DeviceBatch(ids_T, position_T, start_T, end_T, *rows, lengths, weight_S)


def _capacity(tokens: int) -> int:
    """The most int32 elements a packed batch of `tokens` takes: the three scalars and six arrays, each aligned."""
    return ALIGNMENT + 6 * round_up(tokens, ALIGNMENT)
