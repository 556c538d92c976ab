"""A row's columns under the canonical names of a format, and what `data.columns` maps to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parley.config import DataSection
from parley.data.files import Row
from parley.data.loss_weights import ROW_FLAGS
from parley.data.values import short, text_of

Spellings = tuple[tuple[str, ...], ...]
"""Columns, each under its canonical name first, then other names of the same."""

TURN_KEYS = ("role", "content")
"""What `data.columns` may map besides columns: the keys of a turn."""


class Fields:
    """A row's fields under canonical names. `own` maps a canonical name to the row's, where it is not null."""

    def __init__(self, row: Row, origin: str, spellings: Spellings, data: DataSection) -> None:
        self.row, self.origin, self.data = row, origin, data
        self.own: dict[str, str] = {}
        for names in spellings:
            for column in candidates(names, data) if data.columns else names:
                # lookup() only for dotted names: this runs for every column of every row.
                if row.get(column) is not None or ("." in column and lookup(row, column) is not None):
                    self.own[names[0]] = column
                    break

    def value(self, canonical: str) -> Any:
        return lookup(self.row, self.own[canonical]) if canonical in self.own else None

    def text(self, canonical: str) -> str:
        value = self.value(canonical)
        if value is None or (isinstance(value, str) and value.isascii()):  # most, and without building their location
            return value or ""
        return text_of(value, f"{self.origin}: field {self.own[canonical]!r}")

    def flags(self) -> list[str]:
        """The columns that are loss flags of the whole row."""
        return [flag for flag in ROW_FLAGS if self.row.get(flag) is not None and flag not in self.own.values()]


def candidates(names: tuple[str, ...], data: DataSection) -> Iterator[str]:
    """The row's possible names of a column: those that `data.columns` gives, then its spellings that are not mapped."""
    yield from (data.columns[name] for name in names if name in data.columns)
    own = data.columns.values()  # a column that is mapped to one name is not read under its own name as well
    yield from (name for name in names if name not in data.columns and name not in own)


def lookup(row: Row, column: str) -> Any:
    """The value of a column; `a.b` reaches into an object, unless a column has that very name."""
    value = row.get(column)
    if value is not None or "." not in column:
        return value
    value = row
    for key in column.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def listed(row: Row, most: int = 12) -> str:
    """The names of a row's columns for a message."""
    names = [name if len(name) <= 40 else short(name, quoted=False) for name in map(str, list(row)[:most])]
    return ", ".join(names + ["..."] * (len(row) > most)) or "none"
