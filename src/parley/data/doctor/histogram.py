"""Percentiles of a stream of lengths in fixed memory."""

from __future__ import annotations

import math
from collections import Counter

RELATIVE_ERROR = 0.01
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)


class LogHistogram:
    """Counts of logarithmic buckets (DDSketch, arXiv 1908.10693): a percentile is within 1% of a value of its rank.

    Count, total, smallest and largest value are exact. Values up to 2**31 take at most 1,075 buckets.
    """

    def __init__(self) -> None:
        self.count = self.total = self.largest = 0
        self.smallest: int | None = None
        self._buckets: Counter[int] = Counter()

    def add(self, value: int, count: int = 1) -> None:
        self.count += count
        self.total += value * count
        self.largest = max(self.largest, value)
        self.smallest = value if self.smallest is None else min(self.smallest, value)
        self._buckets[math.ceil(math.log(value, _GAMMA)) if value > 0 else -1] += count

    def counts(self) -> list[tuple[int, int]]:
        """Each bucket's middle value and the number of values in it, in ascending order."""
        return [(self._middle(bucket), self._buckets[bucket]) for bucket in sorted(self._buckets)]

    def percentile(self, percent: float) -> int:
        """The value below which `percent` of all values lie; 0 without values."""
        rank = percent / 100 * (self.count - 1)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen > rank:
                return self._middle(bucket)
        return 0

    def _middle(self, bucket: int) -> int:
        middle = 2 * _GAMMA**bucket / (_GAMMA + 1) if bucket >= 0 else 0
        return min(max(round(middle), self.smallest or 0), self.largest)
