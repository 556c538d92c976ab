"""Numbers formatted for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A line of a table; `share` is its percentage of the total that `total` names."""

    name: str
    value: str
    share: float | None = None
    total: str = ""


def flat_rows(values: dict[str, Any], totals: dict[str, str] | None = None) -> list[Row]:
    """Nested figures as rows named `outer: inner`; lists become one line, empty values are left out.

    `totals` maps a key to the one that its numbers are a share of: {"kept": "rows"}.
    """
    rows = []
    for key, value in values.items():
        total_name = (totals or {}).get(key, "")
        total = values.get(total_name)
        for name, leaf in _leaves(key.replace("_", " "), value):
            part = share(leaf, total) if total and isinstance(leaf, int) else None
            rows.append(Row(name, figure(leaf), part, total_name))
    return rows


def figure(value: Any) -> str:
    """A number with thousands separators and four significant digits at most; anything else as str does."""
    # bool is an int in Python, and True is no figure.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def percent(rate: float) -> str:
    """0.981 as 98.1%, 0.5 as 50%."""
    return f"{100 * rate:.1f}".removesuffix(".0") + "%"


def gib(amount: float) -> str:
    return f"{amount:.2f} GiB" if amount < 10 else f"{amount:.1f} GiB"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 03 min."""
    if seconds < 59.5:  # 59.6 s would round to "60 s"
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def share(amount: float, total: float | None) -> float | None:
    """`amount` in percent of `total`; None without a total."""
    return 100 * amount / total if total else None


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}: {key}", inner)
    elif isinstance(value, list | tuple):
        if value:
            yield name, ", ".join(map(figure, value))
    elif value is not None and value != "":
        yield name, value
