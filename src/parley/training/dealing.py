"""Which process trains on which documents of an optimizer step.

Every process reads the same rows in the same order and picks its own share, so a run sees the same data in the same
steps whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from parley.data.packing import Document


def deal(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The indices that each of `count` processes gets, in ascending order: longest first to the one with least tokens.

    This is the LPT rule of multiprocessor scheduling: the largest share is at most 4/3 of the best possible one.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # stable: equal on every process
        least = tokens.index(min(tokens))
        shares[least].append(index)
        tokens[least] += lengths[index]
    return [sorted(share) for share in shares]


def deal_documents(documents: Sequence[Document], count: int) -> list[list[Document]]:
    """The documents of each process, in their order."""
    if count == 1:
        return [list(documents)]
    shares = deal([len(document.ids_L) for document in documents], count)
    return [[documents[index] for index in share] for share in shares]
