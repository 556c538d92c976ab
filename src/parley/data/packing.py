"""Packing: documents of a batch in one row without padding, and the greedy split of a list of documents by tokens.

Shape suffixes: T tokens of the packed row, L tokens of one document.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parley.data.tokens import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "Document", "PackedCollator", "split_by_tokens", "split_documents"]


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation and their labels, IGNORE_INDEX where a token is not supervised."""

    ids_L: NDArray[np.int32]
    label_L: NDArray[np.int32]

    @classmethod
    def from_lists(cls, input_ids: Sequence[int], labels: Sequence[int]) -> Document:
        return cls(np.asarray(input_ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are predicted. The first token of a document never is."""
        return int((self.label_L[1:] != IGNORE_INDEX).sum())


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Greedy split of documents, in order, into runs of at most `max_tokens`; a longer document is a run of its own.

    Args:
        lengths: tokens of each document.

    Returns the run of each micro-batch as a slice of `lengths`.
    """
    cuts, tokens = [0], 0
    for index, length in enumerate(lengths):
        if tokens + length > max_tokens and index > cuts[-1]:
            cuts.append(index)
            tokens = 0
        tokens += length
    return [slice(begin, end) for begin, end in itertools.pairwise([*cuts, len(lengths)])] if lengths else []


class PackedCollator:
    """Join examples into one row of T tokens whose positions restart at every document.

    Without an attention mask and without a cache (`use_cache=False`, as TRL's trainer calls it), transformers reads
    the document borders from `position_ids` and builds a block-diagonal causal mask, so that no document sees another
    (transformers.masking_utils, `find_packed_sequence_indices`). Nothing is padded and nothing is cut.

    Takes examples with `input_ids` and `labels` (IGNORE_INDEX where nothing is learned); returns `input_ids`, `labels`
    and `position_ids`, each (1, T) and int64. The first token of a document is never a target.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_T: list[int] = []
        labels_T: list[int] = []
        positions_T: list[int] = []
        for example in examples:
            ids = example["input_ids"]
            ids_T.extend(ids)
            labels_T.append(IGNORE_INDEX)
            labels_T.extend(example["labels"][1:])
            positions_T.extend(range(len(ids)))
        assert len(ids_T) == len(labels_T)
        rows = {"input_ids": ids_T, "labels": labels_T, "position_ids": positions_T}
        return {name: torch.tensor([row], dtype=torch.int64) for name, row in rows.items()}


def split_documents(batch: dict[str, torch.Tensor], max_tokens: int) -> list[dict[str, torch.Tensor]]:
    """Cut a packed row between documents into rows of at most `max_tokens`; a longer document gets its own."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    bounds = [*starts, batch["position_ids"].shape[1]]
    runs = split_by_tokens([end - start for start, end in itertools.pairwise(bounds)], max_tokens)
    return [{name: row_1T[:, bounds[run.start] : bounds[run.stop]] for name, row_1T in batch.items()} for run in runs]
