"""Packing: the documents of a batch, one padding-free row of them, and their greedy split by tokens.

Shape suffixes: T tokens of the packed row, L tokens of one document.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parley.data.control_tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation and their labels, IGNORE_INDEX where a token is not supervised.

    `origin` names its row to the owner of the data; empty where it is not known. `weight_L` are the loss weights of its
    tokens, None where all are 1.
    """

    ids_L: NDArray[np.int32]
    label_L: NDArray[np.int32]
    origin: str = ""
    weight_L: NDArray[np.float32] | None = None

    @classmethod
    def from_lists(
        cls, input_ids: Sequence[int], labels: Sequence[int], origin: str = "", weights: Sequence[float] | None = None
    ) -> Document:
        weight_L = None if weights is None else np.asarray(weights, dtype=np.float32)
        return cls(np.asarray(input_ids, dtype=np.int32), np.asarray(labels, dtype=np.int32), origin, weight_L)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are predicted. The first token of a document never is."""
        return int((self.label_L[1:] != IGNORE_INDEX).sum())

    @property
    def loss_weight(self) -> float:
        """The sum of the predicted tokens' loss weights: their number where the document has no weights."""
        if self.weight_L is None:
            return self.supervised_tokens
        return float(self.weight_L[1:][self.label_L[1:] != IGNORE_INDEX].sum(dtype=np.float64))

    def with_weights(self) -> Document:
        """The same with its loss weights written out."""
        return self if self.weight_L is not None else replace(self, weight_L=np.ones(len(self.ids_L), np.float32))


def loss_weight(documents: Iterable[Document]) -> float:
    """What the summed loss of `documents` is divided by; 1 where nothing is supervised."""
    return sum(document.loss_weight for document in documents) or 1.0


def with_weights(documents: Sequence[Document]) -> list[Document]:
    """`documents`, all with loss weights where one of them has some."""
    if all(document.weight_L is None for document in documents):
        return list(documents)
    return [document.with_weights() for document in documents]


def split_by_tokens(lengths: Sequence[int], max_tokens: float) -> list[slice]:
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


DOCUMENTS = "documents"
"""Key of a batch's documents. They stay on the host, where the fused step reads their lengths."""


ORIGIN = "origin"
"""Column of a data set that names each row, as the row's Example does."""

LOSS_WEIGHTS = "loss_weights"
"""Column of a data set, and key of a batch, with the loss weight of each token. Absent or null where all are 1."""


class DocumentCollator:
    """Rows of a data set to `{"documents": [Document, ...]}`, without padding and without copies of the whole batch.

    A row has `input_ids` (L,) and `labels` (L,), IGNORE_INDEX where a token is not supervised, and may have
    `loss_weights` (L,). A row that TRL packed has several documents, whose lengths its `seq_lengths` gives.
    """

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, list[Document]]:
        return {DOCUMENTS: [document for row in rows for document in _documents(row)]}


class PackedCollator(DocumentCollator):
    """Name of the version before; it gives one row (1, T) as it did. SFTTrainer makes its collator itself."""

    def __init__(self) -> None:
        warnings.warn(
            "PackedCollator is now DocumentCollator, which SFTTrainer uses by itself; leave data_collator out",
            FutureWarning,
            stacklevel=2,
        )

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return padding_free_row([document for row in rows for document in _documents(row)])


class PaddedCollator:
    """Rows of a data set to one padded row a document, by `pad`: a collator of `input_ids` and `labels`."""

    def __init__(self, pad: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.pad = pad

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return self.pad_documents([document for row in rows for document in _documents(row)])

    def pad_documents(self, documents: Iterable[Document]) -> dict[str, Any]:
        """`input_ids`, `labels`, `attention_mask` and, where one has them, `loss_weights`, (B, L), of B documents."""
        documents = with_weights(list(documents))
        batch = self.pad([{"input_ids": d.ids_L.tolist(), "labels": d.label_L.tolist()} for d in documents])
        if documents and documents[0].weight_L is not None:
            weight_BL = torch.zeros(batch["labels"].shape)
            # The side that the labels are padded on is the collator's choice; attention says where a row begins.
            for row, document in enumerate(documents):
                weight_BL[row, batch["attention_mask"][row].bool()] = torch.from_numpy(document.weight_L)
            batch[LOSS_WEIGHTS] = weight_BL
        return batch


def _documents(row: dict[str, Any]) -> list[Document]:
    row_document = Document.from_lists(row["input_ids"], row["labels"], row.get(ORIGIN, ""), row.get(LOSS_WEIGHTS))
    lengths = row.get("seq_lengths")
    if not lengths:
        return [row_document]
    borders = list(itertools.accumulate(lengths))[:-1]
    ids, labels = np.split(row_document.ids_L, borders), np.split(row_document.label_L, borders)
    weights = [None] * len(ids) if row_document.weight_L is None else np.split(row_document.weight_L, borders)
    return [Document(ids_L, label_L, weight_L=w_L) for ids_L, label_L, w_L in zip(ids, labels, weights, strict=True)]


def padding_free_row(documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `position_ids`, each (1, T) and int64: the documents end to end. Where one has some,
    `loss_weights`, (1, T).

    Without an attention mask and without a cache (`use_cache=False`, as TRL's trainer calls it), transformers reads
    the document borders from `position_ids`, which restart at 0, and builds a block-diagonal causal mask
    (transformers.masking_utils, `find_packed_sequence_indices`). The first token of a document is never a target.
    """
    labels = [document.label_L.copy() for document in documents]
    # It would be predicted from the last token of the document before it.
    for label_L in labels:
        label_L[:1] = IGNORE_INDEX
    row = {
        "input_ids": _joined([document.ids_L for document in documents]),
        "labels": _joined(labels),
        "position_ids": _joined([np.arange(len(document.ids_L), dtype=np.int32) for document in documents]),
    }
    weights = [document.weight_L for document in with_weights(documents) if document.weight_L is not None]
    if weights:
        row[LOSS_WEIGHTS] = torch.from_numpy(np.concatenate(weights))[None]
    return row


def _joined(parts: list[NDArray[np.int32]]) -> torch.Tensor:
    """The parts end to end, (1, T)."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
