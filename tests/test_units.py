"""Units and small arithmetic."""

from __future__ import annotations

import pytest

from parley.units import counted, short_count


@pytest.mark.parametrize(
    ("count", "short"), [(7, "7"), (3_280_000, "3.28 M"), (1_235_814_400, "1.24 B"), (70_553_706_496, "70.6 B")]
)
def test_counts_are_short(count: int, short: str) -> None:
    assert short_count(count) == short


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (2.5, "2.5 steps"), (1_235_814_400, "1,235,814,400 steps")],
)
def test_nouns_follow_their_number(count: float, text: str) -> None:
    assert counted(count, "step") == text
