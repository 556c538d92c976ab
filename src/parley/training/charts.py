"""Line charts as plain geometry, which a template writes as inline SVG.

Every position is in percent of the plotting area, x from the left and y from the top, so that the SVG scales to any
width while text and strokes keep their size. A value of None was not measured and is left out; a value that is not
finite breaks the line and is marked.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

MAX_POINTS = 1000  # about one a pixel of a wide chart
SMOOTH_FROM = 40  # points; a shorter series is readable without a moving mean

HoverRow = list[float | None]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What the template needs for one chart.

    `hover` has a row [step, value] or [step, value, mean] for each point; `broken` are the x positions of values
    that are not finite, of which there were `broken_count`; `window` is the width of the moving mean
    in values, 1 without one.
    """

    title: str
    unit: str
    x_range: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    raw: str
    mean: str
    window: int
    dots: list[Dot]
    dots_line: str
    spikes: list[Dot]
    broken: list[float]
    broken_count: int
    hover: list[HoverRow]
    last: str


def line_chart(
    title: str,
    unit: str,
    values: Sequence[tuple[int, float | None]],
    *,
    dots: Sequence[tuple[int, float | None]] = (),
    spikes: Sequence[tuple[int, float | None]] = (),
    from_zero: bool = False,
    smooth: bool = False,
) -> Chart | None:
    """The chart of (step, value) pairs with further single `dots` and `spikes`; None when nothing was measured."""
    measured = sorted((pair for pair in values if pair[1] is not None), key=lambda pair: pair[0])
    steps = [step for step, _ in measured]
    series = [float(value) for _, value in measured if value is not None]
    marks, peaks = (
        sorted((step, value) for step, value in points if value is not None and math.isfinite(value))
        for points in (dots, spikes)
    )
    if not series and not marks:
        return None
    x_low, x_high = _x_range([*steps, *(step for step, _ in [*marks, *peaks])])
    finite = [value for value in [*series, *(value for _, value in [*marks, *peaks])] if math.isfinite(value)]
    x_values = nice_ticks(x_low, x_high, integer=True, inside=True)
    y_values = nice_ticks(*_y_range(finite, from_zero))

    def x_of(step: float) -> float:
        return round(100 * (step - x_low) / (x_high - x_low), 2)

    def y_of(value: float) -> float:
        return round(100 * (y_values[-1] - value) / (y_values[-1] - y_values[0]), 2)

    kept = thin(series, MAX_POINTS)
    window = 2 * (len(series) // 40) + 1 if smooth and len(series) >= SMOOTH_FROM else 1
    means = moving_mean(series, window) if window > 1 else []
    points = [(x_of(steps[i]), y_of(series[i]) if math.isfinite(series[i]) else None) for i in kept]
    mean_points = [(x_of(steps[i]), y_of(means[i])) for i in kept if means and math.isfinite(means[i])]
    broken = [x_of(step) for step, value in zip(steps, series, strict=True) if not math.isfinite(value)]
    return Chart(
        title=title,
        unit=unit,
        x_range=(x_low, x_high),
        x_ticks=[Tick(x_of(tick), f"{tick:,.0f}" if x_high < 1e5 else short(tick)) for tick in x_values],
        y_ticks=[Tick(y_of(tick), short(tick)) for tick in y_values],
        raw=_path(points),
        mean=_path(mean_points),
        window=window,
        dots=[Dot(x_of(step), y_of(value), f"step {step:,}: {value:.4g}") for step, value in marks],
        dots_line=_path([(x_of(step), y_of(value)) for step, value in marks]) if len(marks) > 1 else "",
        spikes=[Dot(x_of(step), y_of(value), f"step {step:,}: {value:.4g}") for step, value in peaks],
        broken=sorted(set(broken))[:: 1 + len(set(broken)) // MAX_POINTS],
        broken_count=len(broken),
        hover=_hover(kept, steps, [series, means] if means else [series]),
        last=f"{_last(series[-1])} at step {steps[-1]:,}" if series else "",
    )


def thin(series: Sequence[float], limit: int) -> list[int]:
    """Indices of at most `limit` values, in order: the first, the last, and the extremes of equal bins between.

    A bin without a finite value keeps one that is not, so that the line still breaks there.
    """
    count = len(series)
    if count <= limit:
        return list(range(count))
    bins = (limit - 2) // 2  # a minimum and a maximum of each
    edges = [1 + (count - 2) * k // bins for k in range(bins + 1)]
    kept = {0, count - 1}
    for start, end in pairwise(edges):
        finite = [i for i in range(start, end) if math.isfinite(series[i])]
        key: Callable[[int], float] = series.__getitem__
        kept |= {min(finite, key=key), max(finite, key=key)} if finite else {start}
    return sorted(kept)


def moving_mean(series: Sequence[float], window: int) -> list[float]:
    """The mean of the finite values in a centred window; NaN where there are none.

    The window narrows symmetrically towards the start, where a loss falls fast; at the end it is cut off.
    """
    # Prefix sums: the mean of any window is two subtractions and a division.
    finite = [math.isfinite(value) for value in series]
    sums = [0.0, *accumulate(value if ok else 0.0 for value, ok in zip(series, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for i in range(len(series)):
        half = min(window // 2, i)
        start, end = i - half, min(i + half + 1, len(series))
        count = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / count if count else math.nan)
    return means


def nice_ticks(low: float, high: float, *, about: int = 6, integer: bool = False, inside: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low..high, or lie within it with `inside`."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * (1, 2, 5, 10)[bisect_right((1, 2, 5), raw / power * (1 - 1e-9))]
    step = max(step, 1.0) if integer else step
    slack = 1e-9  # 0.3 / 0.1 is 2.9999999999999996
    first = math.ceil(low / step - slack) if inside else math.floor(low / step + slack)
    last = math.floor(high / step + slack) if inside else math.ceil(high / step - slack)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def short(value: float, digits: int = 6) -> str:
    """A number as an axis shows it: 0, 0.25, 20k, 1.5M, 2e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for least, unit, suffix in ((1e6, 1e6, "M"), (1e3, 1e3, "k"), (1e-2, 1.0, "")):
        if least <= abs(value) < 1e3 * unit:
            return f"{value / unit:.{digits}g}{suffix}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _last(value: float) -> str:
    return short(value, 4) if math.isfinite(value) else "not finite"


def _x_range(steps: list[int]) -> tuple[float, float]:
    low, high = min(steps), max(steps)
    if low == high or 0 < low <= high / 20:  # steps count from 1; an axis reads better from 0
        low = min(0, low)
    return low, max(low + 1, high)


def _y_range(finite: list[float], from_zero: bool) -> tuple[float, float]:
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if from_zero or high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(0.0, low), max(0.0, high)
    return (low, high) if low < high else (0.0, 1.0)


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """SVG path data; a gap where y is None, and a zero-length line (a round dot) for a point between two gaps."""
    path, pen_down = [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen_down = False
            continue
        isolated = not pen_down and (i + 1 == len(points) or points[i + 1][1] is None)
        path.append(f"{'L' if pen_down else 'M'}{x:g} {y:g}" + ("h0" if isolated else ""))
        pen_down = True
    return "".join(path)


def _hover(kept: list[int], steps: list[int], columns: list[list[float]]) -> list[HoverRow]:
    """Rows of numbers for JSON, which has no NaN: four significant digits, None where not finite."""
    return [
        [steps[i], *(float(f"{column[i]:.4g}") if math.isfinite(column[i]) else None for column in columns)]
        for i in kept
    ]
