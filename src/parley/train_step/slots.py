"""Sums of log-probabilities over the tokens of a packed batch: which supervised token belongs to which sum.

Shape suffixes (legend in docs/design.md): S supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def copy_to(device: torch.device, host: Tensor) -> Tensor:
    """`host` on `device`. The host of a GPU does not wait, as it would for a copy from memory that is not pinned."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@dataclass(frozen=True)
class Slots:
    """`by_document` holds, for each document, the slot of each of its supervised tokens in order; `count` slots exist.

    The first token of a document is never predicted, so it is not among them.
    """

    by_document: Sequence[NDArray[np.int64]]
    count: int

    def of(self, run: slice) -> Tensor:
        """The slots of the supervised rows of the documents in `run`, (S,)."""
        return torch.from_numpy(np.concatenate(self.by_document[run]))
