"""Random rows that trainers of these tests learn from."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from parley.data.control_tokens import IGNORE_INDEX


def supervised_rows(count: int = 48) -> Dataset:
    """`count` rows of 5 to 29 token ids below 300, whose second half is supervised."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        length = int(rng.integers(5, 30))
        ids = rng.integers(0, 300, length)
        labels = np.where(np.arange(length) > length // 2, ids, IGNORE_INDEX)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)
