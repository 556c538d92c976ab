from __future__ import annotations

import pytest

from parley.training.formatting import Row, duration, figure, flat_rows, gib, percent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.41, "0.41 s"), (9.6, "10 s"), (59.4, "59 s"), (59.9, "1 min 00 s"), (185, "3 min 05 s"), (7384, "2 h 03 min")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [percent(rate) for rate in (0, 0.0125, 0.5, 1.0)] == ["0%", "1.2%", "50%", "100%"]
    assert [gib(amount) for amount in (3.613, 139.81)] == ["3.61 GiB", "139.8 GiB"]
    assert [figure(value) for value in (13454, 240.07, 1234567.8, True, "dolly")] == [
        "13,454",
        "240.1",
        "1,234,568",
        "True",
        "dolly",
    ]


def test_flat_rows_name_nested_figures_and_their_share() -> None:
    rows = flat_rows(
        {"rows": 200, "dropped": {"too long": 50}, "length": {"p95": 7.5}, "first": ["line 3", 4], "no": {}, "n": None},
        {"dropped": "rows"},
    )  # fmt: skip
    assert rows == [
        Row("rows", "200"),
        Row("dropped: too long", "50", 25.0, "rows"),
        Row("length: p95", "7.5"),
        Row("first", "line 3, 4"),
    ]
