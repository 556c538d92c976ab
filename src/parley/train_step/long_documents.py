"""Documents long enough for cuDNN's attention (kernels/library_attention.py), and the lengths it is given.

cuDNN builds a plan for each length, which takes the host more than 100 ms. So documents are padded to few lengths,
whose plans are built before the first step.

Shape suffixes: N documents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from parley.units import round_up

LONG_DOCUMENT = 3072  # tokens from which on cuDNN on padded documents was faster than kernels/attention.py (H200)
FLASH_4_HEADS = (64, 128)  # sizes of heads that flash-attn-4 was measured and tested with
MIN_MULTIPLE = 512
MAX_PLANS = 12  # built before the first step; data of more lengths has each of the others built when it comes


def padded_length(length: int) -> int:
    """The next multiple of a quarter to an eighth of `length`: at most 9 of one power of two."""
    return round_up(length, max(MIN_MULTIPLE, 1 << (length.bit_length() - 3)))


def planned_lengths(length_N: NDArray[np.integer]) -> list[int]:
    """The padded lengths of the long documents among `length_N`, the most frequent first, at most MAX_PLANS."""
    long_N = length_N[length_N > LONG_DOCUMENT] - 1  # no loss depends on the last token of a document
    lengths, counts = np.unique([padded_length(int(length)) for length in long_N], return_counts=True)
    return [int(length) for length in lengths[np.argsort(-counts, kind="stable")][:MAX_PLANS]]
