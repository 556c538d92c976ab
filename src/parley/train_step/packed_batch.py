"""Conversations of one pass, laid end to end as one row of tokens.

Shape suffixes: T tokens in a pack, S supervised tokens, N documents, L the longest document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parley.train_step.matmul import whole

IGNORED = -100
LONG = 2048  # tokens of a document from which on attention's arithmetic outweighs the launches of a library
ALIGNED = 4  # kernels are compiled for pointers to 16 bytes and once more for others
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation and their labels, -100 where a token is not learned."""

    ids_L: Ints
    label_L: Ints

    @classmethod
    def of(cls, input_ids: Sequence[int], labels: Sequence[int]) -> Example:
        return cls(np.asarray(input_ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))

    @property
    def supervised(self) -> int:
        """Tokens that are predicted: the first of a document never is."""
        return int((self.label_L[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Pack:
    """Documents end to end, on the host.

    `start_T` and `end_T` give, for each token, the first row of its document and the row after its last.
    `row_S` are the rows whose next token is supervised and `target_S` those tokens.
    """

    ids_T: Ints
    position_T: Ints
    start_T: Ints
    end_T: Ints
    row_S: Ints
    target_S: Ints
    lengths: tuple[int, ...]

    def padded(self, tokens: int) -> Pack:
        """The same documents in a row of `tokens`, each further token a document of its own that teaches nothing."""
        more = tokens - len(self.ids_T)
        assert more >= 0, "a bucket holds its packs"
        own, nothing = np.arange(len(self.ids_T), tokens, dtype=np.int32), np.zeros(more, dtype=np.int32)
        return Pack(
            np.concatenate([self.ids_T, nothing]),
            np.concatenate([self.position_T, nothing]),
            np.concatenate([self.start_T, own]),
            np.concatenate([self.end_T, own + 1]),
            self.row_S,
            self.target_S,
            self.lengths + (1,) * more,
        )

    def needed(self) -> Pack:
        """Without each document's rows behind its last supervised one: nothing that is learned looks at them."""
        ends_N = np.cumsum(self.lengths)
        starts_N = ends_N - self.lengths
        last_N = np.concatenate([[-1], self.row_S])[np.searchsorted(self.row_S, ends_N)]
        kept_N = np.maximum(last_N + 1 - starts_N, 0)
        kept_T = self.position_T < np.repeat(kept_N, self.lengths)
        row_T = np.cumsum(kept_T, dtype=np.int32) - 1
        lengths_N = kept_N[kept_N > 0]
        return Pack(
            self.ids_T[kept_T],
            self.position_T[kept_T],
            *_borders(lengths_N),
            row_T[self.row_S],
            self.target_S,
            tuple(lengths_N.tolist()),
        )


def pack(examples: Iterable[Example]) -> Pack:
    """Lay `examples` end to end."""
    examples = list(examples)
    lengths_N = np.array([len(e.ids_L) for e in examples], dtype=np.int32)
    start_T, end_T = _borders(lengths_N)
    target_T = np.roll(np.concatenate([e.label_L for e in examples]), -1)
    target_T[np.cumsum(lengths_N) - 1] = IGNORED  # what begins the next document follows from nothing
    (row_S,) = np.nonzero(target_T != IGNORED)
    return Pack(
        np.concatenate([e.ids_L for e in examples]),
        np.arange(len(start_T), dtype=np.int32) - start_T,
        start_T,
        end_T,
        row_S.astype(np.int32),
        target_T[row_S],
        tuple(lengths_N.tolist()),
    )


def _borders(lengths_N: NDArray[np.integer]) -> tuple[Ints, Ints]:
    """For each token the first row of its document and the row after its last."""
    ends_N = np.cumsum(lengths_N, dtype=np.int32)
    return np.repeat(ends_N - lengths_N.astype(np.int32), lengths_N), np.repeat(ends_N, lengths_N)


def split(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Runs of examples, in order, of at most `max_tokens` each; a longer example is a run of its own."""
    runs: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.ids_L) > room:
            runs.append([])
            room = max_tokens
        runs[-1].append(example)
        room -= len(example.ids_L)
    return runs


@dataclass(frozen=True)
class Rows:
    """A pack on the device, as the step reads it. Rows behind the documents of `lengths` are there for their number."""

    ids_T: Tensor
    position_T: Tensor
    start_T: Tensor
    end_T: Tensor
    row_S: Tensor
    target_S: Tensor
    scale: Tensor  # 0-dim fp32: one over the supervised tokens of the whole optimizer step
    lengths: tuple[int, ...] | None  # None under a CUDA graph, where only the device knows them

    @property
    def tokens(self) -> int:
        return self.ids_T.shape[0]


class Staging:
    """One pinned host buffer and its device copy, so that a pass costs one transfer.

    The device copy stays where it is for CUDA graphs to read; `reserve` says when it had to move.
    """

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self.sent = torch.cuda.Event() if self.pinned else None
        self.host, self.static = self._buffers(tokens)

    def _buffers(self, tokens: int) -> tuple[Tensor, Tensor]:
        room = _room(tokens)
        host = torch.empty(room, dtype=torch.int32, pin_memory=self.pinned)
        return host, torch.empty(room, dtype=torch.int32, device=self.device)

    def reserve(self, tokens: int) -> bool:
        """Make room for a pack of `tokens`. True when the device copy moved: graphs that read it must be dropped."""
        if _room(tokens) <= self.host.numel():
            return False
        self.host, self.static = self._buffers(tokens)
        return True

    def send(self, pack: Pack, scale: float, lengths: tuple[int, ...] | None) -> Rows:
        """Copy `pack` to the device; the rows are views of the static copy."""
        parts = [
            np.array([scale], dtype=np.float32).view(np.int32),
            *(pack.ids_T, pack.position_T, pack.start_T, pack.end_T, pack.row_S, pack.target_S),
        ]
        ends = list(accumulate(whole(len(part), ALIGNED) for part in parts))
        assert ends[-1] <= self.host.numel(), "reserve comes before send"
        if self.sent is not None:
            self.sent.synchronize()  # the copy before has left the host buffer
        places = [slice(begin, begin + len(part)) for begin, part in zip([0, *ends], parts, strict=False)]
        for place, part in zip(places, parts, strict=True):
            self.host.numpy()[place] = part
        self.static[: ends[-1]].copy_(self.host[: ends[-1]], non_blocking=True)
        if self.sent is not None:
            self.sent.record()
        scale_1, ids_T, position_T, start_T, end_T, row_S, target_S = (self.static[place] for place in places)
        scale = scale_1.view(torch.float32)[0]
        return Rows(ids_T, position_T, start_T, end_T, row_S, target_S, scale, lengths)


def _room(tokens: int) -> int:
    """What a pack of `tokens` takes at most: the scale and six parts, each from an aligned place on."""
    return ALIGNED + 6 * whole(tokens, ALIGNED)
