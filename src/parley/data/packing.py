"""Padding-free batches: the documents of a batch become one row. Shapes: T tokens in the row."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from parley.data.tokens import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "PackedCollator", "split_documents"]


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
    ends = [*starts[1:], batch["position_ids"].shape[1]]
    cuts = [0]
    for start, end in zip(starts, ends, strict=True):
        if end - cuts[-1] > max_tokens and start > cuts[-1]:
            cuts.append(start)
    cuts.append(ends[-1])
    return [{name: row_1T[:, begin:end] for name, row_1T in batch.items()} for begin, end in itertools.pairwise(cuts)]
