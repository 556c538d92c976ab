from __future__ import annotations

import math
import random

import pytest

from parley.training.charts import MAX_POINTS, line_chart, moving_mean, nice_ticks, short, thin

NAN, INF = math.nan, math.inf


def test_thinning_keeps_ends_and_extremes_in_order() -> None:
    draw = random.Random(0)
    series = [draw.gauss(0, 1) for _ in range(100_000)]
    series[31_415], series[92_653] = 50.0, -50.0
    kept = thin(series, MAX_POINTS)
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(set(kept))
    assert {0, 31_415, 92_653, 99_999} <= set(kept)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000])
def test_a_short_log_is_not_thinned(count: int) -> None:
    assert thin([1.0] * count, 1000) == list(range(count))


def test_a_long_stretch_of_nan_still_breaks_a_thinned_line() -> None:
    series = [1.0] * 4000 + [NAN] * 2000 + [2.0] * 4000
    chart = line_chart("Loss", "", list(enumerate(series)))
    assert chart is not None
    assert chart.raw.count("M") == 2
    assert chart.broken_count == 2000
    assert len(chart.broken) <= MAX_POINTS


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.92, 3.4, [0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (0, 0.3, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (-3, 4, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_step_ticks_are_whole_and_inside() -> None:
    assert nice_ticks(1, 3, integer=True, inside=True) == [1, 2, 3]
    assert nice_ticks(7, 1003, integer=True, inside=True) == [200, 400, 600, 800, 1000]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (12_500, "12.5k"), (3e6, "3M"), (2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (-2e12, "-2e12")],
)
def test_axis_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_mean_passes_over_what_is_not_finite() -> None:
    assert moving_mean([1, NAN, 3, INF, 5], 3) == [1, 2, 3, 4, 5]
    assert math.isnan(moving_mean([NAN], 3)[0])


def test_mean_follows_the_start_and_looks_back_at_the_end() -> None:
    means = moving_mean([float(i) for i in range(10)], 5)
    assert means[:8] == list(range(8))  # centred: no lag on a slope, not even at the first value
    assert means[8:] == [7.5, 8.0]


def test_positions_of_line_dots_and_ticks() -> None:
    chart = line_chart("Loss", "nats", [(50, 4.0), (0, 0.0), (100, 2.0)], dots=[(100, 1.0)])
    assert chart is not None
    assert chart.raw == "M0 100L50 0L100 50"  # y from the top, sorted by step
    assert [(dot.x, dot.y) for dot in chart.dots] == [(100, 75)]
    assert [(tick.at, tick.label) for tick in chart.y_ticks][:2] == [(100, "0"), (75, "1")]
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert chart.last == "2 at step 100"


def test_a_value_between_two_gaps_is_drawn_as_a_dot() -> None:
    chart = line_chart("Loss", "", [(0, 1.0), (1, NAN), (2, 2.0), (3, INF), (4, 3.0), (5, 2.5)])
    assert chart is not None
    assert chart.raw == "M0 100h0M40 50h0M80 0L100 25"
    assert chart.broken == [20, 60]
    assert [row[1] for row in chart.hover] == [1.0, None, 2.0, None, 3.0, 2.5]


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-30, 1e30, NAN])
def test_one_step(value: float) -> None:
    chart = line_chart("Loss", "", [(1, value)])
    assert chart is not None
    assert ("h0" in chart.raw) == math.isfinite(value)
    assert all(0 <= tick.at <= 100 for tick in [*chart.x_ticks, *chart.y_ticks])
    assert len(chart.y_ticks) >= 2


def test_nothing_measured_is_no_chart() -> None:
    assert line_chart("Loss", "", []) is None
    assert line_chart("Loss", "", [(1, None), (2, None)]) is None


def test_a_resumed_log_starts_where_it_starts() -> None:
    chart = line_chart("Loss", "", [(step, 1.0) for step in range(500, 1001)])
    assert chart is not None
    assert chart.x_range == (500, 1000)
