"""Rows that cannot be read, understood or rendered: an error, or skipped, counted and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parley.config import DataSection
from parley.data.example import Example
from parley.errors import DataError


@dataclass(frozen=True)
class BadRow:
    """What is wrong with a row, in one line that names it, and the row as far as it could be read."""

    origin: str
    error: DataError
    row: Any = None


@dataclass(frozen=True)
class LeftOut:
    """A row that `data.drop` leaves out, and the check that found it."""

    origin: str
    check: str


ALLOWED = 10
"""Bad rows that a limit by share never refuses."""
JUDGED_FROM = 1000
"""Rows from which on a share is judged while they are read: bad rows may come first."""


@dataclass
class BadRows:
    """The policy of `data.bad_rows`. `skipped`: in the order they were read. `advise`: errors name the setting.

    rows: rows read so far, bad ones included; a stream counts those of all its passes.
    """

    data: DataSection
    advise: bool = True
    rows: int = 0
    skipped: list[BadRow] = field(default_factory=list)
    _origins: set[str] = field(default_factory=set)
    _path: Path | None = None

    def handle(self, bad: BadRow) -> None:
        """Raise the row's error, or with `skip` keep the row; a stream meets the same row once a pass.

        Raises DataError past `data.bad_rows_limit`.
        """
        if self.data.bad_rows == "error":
            raise DataError(f"{bad.error}; data.bad_rows=skip leaves such rows out") if self.advise else bad.error
        if bad.origin in self._origins:
            return
        self._origins.add(bad.origin)
        self.skipped.append(bad)
        self._check(max(self.rows, JUDGED_FROM))
        if self._path is not None:
            self._append([bad])

    def check(self) -> None:
        """Raise DataError where more rows are bad than `data.bad_rows_limit` allows of all rows."""
        self._check(self.rows)

    def _check(self, rows: int) -> None:
        limit = self.data.bad_rows_limit
        by_share = 0 < limit < 1
        if len(self.skipped) > (max(ALLOWED, limit * rows) if by_share else limit):
            count, last = f"{len(self.skipped):,} of {self.rows:,} rows are bad", self.skipped[-1].error
            allowed = f"{limit:.3g} of the rows" if by_share else f"{limit:,.0f}"
            raise DataError(f"{count}, data.bad_rows_limit allows {allowed}; the last: {last}")

    def write_to(self, path: Path) -> None:
        """Write the rows skipped so far to `path`, a JSON object a line, and those skipped later as they come."""
        self._path = path
        if self.skipped:
            self._append(self.skipped)

    def _append(self, rows: list[BadRow]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            for bad in rows:
                entry = {"origin": bad.origin, "error": str(bad.error), "row": bad.row}
                file.write(json.dumps(entry, default=str) + "\n")  # ASCII: a row may hold lone surrogates


def of_example(example: Example, error: DataError) -> BadRow:
    """A row that was understood, but cannot be rendered."""
    row = {name: value for name, value in vars(example).items() if value is not None and name != "origin"}
    return BadRow(example.origin, error, row)
