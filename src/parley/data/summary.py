"""What became of a data set's rows: counts, and the lines that report them."""

from __future__ import annotations

from array import array

import numpy as np
from pydantic import BaseModel, Field, PrivateAttr, computed_field

NAMED = 5
"""Rows of a group whose origins are kept."""
UNREAD_NAMED = 12


class RowGroup(BaseModel):
    """Rows that share a property: how many, and the origins of the first of them."""

    count: int = 0
    first: list[str] = Field(default_factory=list)

    def add(self, origin: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(origin)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        parts = [origin.rpartition(" ") for origin in self.first]
        if len(parts) > 1 and len({prefix for prefix, _, _ in parts}) == 1:
            return f"({parts[0][0]}s {', '.join(number for _, _, number in parts)}{more})"
        return f"({', '.join(self.first)}{more})"


class DataSummary(BaseModel):
    """Counts of a data set: `rows` read, of which `kept` to train on and `heldout`; tokens and lengths of the kept.

    With streaming the counts grow as rows are read.
    """

    source: str
    format: str = ""
    reason: str = ""
    streaming: bool = False
    rows: int = 0
    kept: int = 0
    heldout: int = 0
    heldout_source: str | None = None
    heldout_dropped: dict[str, RowGroup] = Field(default_factory=dict)
    heldout_repeated: int = Field(0, description="Held-out rows that also occur among the training rows.")
    dropped: dict[str, RowGroup] = Field(default_factory=dict)
    shortened: RowGroup = Field(default_factory=RowGroup)
    shortened_how: str = Field("", description="What was done to those that were too long.")
    repeated: RowGroup = Field(default_factory=RowGroup)
    notes: dict[str, RowGroup] = Field(default_factory=dict, description="What rendering has to say of some rows.")
    bad: RowGroup = Field(default_factory=RowGroup, description="Rows that could not be read or rendered.")
    bad_error: str = Field("", description="What was wrong with the first of them.")
    unread: list[str] = Field(default_factory=list, description="Columns that the format does not use.")
    prompts_only: bool = Field(False, description="Rows are prompts, whose answers are sampled.")
    tokens: int = 0
    supervised_tokens: int = 0

    # 4 bytes a row, where a list of int takes 8 for the pointers alone: data sets have millions of rows.
    _lengths: array[int] = PrivateAttr(default_factory=lambda: array("i"))

    def restart(self) -> None:
        """Reset the counts of the training rows, before a stream is read again."""
        self.rows = self.kept = self.tokens = self.supervised_tokens = 0
        self.dropped, self.shortened, self.notes = {}, RowGroup(), {}
        self.bad, self.bad_error = RowGroup(), ""
        self._lengths = array("i")

    def drop(self, reason: str, origin: str) -> None:
        self.dropped.setdefault(reason, RowGroup()).add(origin)

    def shorten(self, how: str, origin: str) -> None:
        """Count a row of which a part is kept; `how` follows "12 rows" in the report."""
        self.shortened_how = how
        self.shortened.add(origin)

    def note(self, note: str, origin: str) -> None:
        self.notes.setdefault(note, RowGroup()).add(origin)

    def skip(self, origin: str, error: str) -> None:
        """Count a bad row."""
        self.bad.add(origin)
        self.bad_error = self.bad_error or error

    def keep(self, tokens: int, supervised: int) -> None:
        self.kept += 1
        self.tokens += tokens
        self.supervised_tokens += supervised
        self._lengths.append(tokens)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def length_mean(self) -> float:
        return self.tokens / self.kept if self.kept else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def length_median(self) -> float:
        return self._percentile(50)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def length_p95(self) -> float:
        return self._percentile(95)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def length_max(self) -> int:
        return max(self._lengths, default=0)

    def _percentile(self, percent: int) -> float:
        return float(np.percentile(np.frombuffer(self._lengths, dtype=np.int32), percent)) if self._lengths else 0.0

    def lines(self, repeats: bool = True) -> list[str]:
        """The report: a line for each count that is worth one. Without `repeats`, repeated rows are not among them."""
        so_far = " so far" if self.streaming else ""
        lines = [f"{_rows(self.rows)} read{so_far} from {self.source}: {self.reason}"]
        lines.append(f"{self.kept:,} kept to train on{self._heldout_part()}")
        if self.dropped:
            lines.append(self.dropped_line())
        if self.bad.count:
            count = f"{self.bad.count:,} bad row{'s' * (self.bad.count != 1)} skipped"
            lines.append(f"{count} {self.bad}; the first: {self.bad_error}")
        if self.unread:
            lines.append(self.unread_line())
        if self.heldout_dropped:
            lines.append(f"of the rows to hold out, {_dropped_line(self.heldout_dropped)}")
        if self.shortened.count:
            lines.append(self.shortened_line())
        if self.kept:
            share = self.supervised_tokens / self.tokens
            supervised = f"tokens, {self.supervised_tokens:,} of them supervised ({share:.0%})"
            lines.append(f"{self.tokens:,} {'tokens of prompts' if self.prompts_only else supervised}")
            lines.append(
                f"tokens a row: mean {self.length_mean:.0f}, median {self.length_median:.0f}, "
                f"95% up to {self.length_p95:.0f}, longest {self.length_max:,}"
            )
        if repeats and self.repeated.count:
            lines.append(f"rows that repeat an earlier one: {self.repeated.count:,} {self.repeated}")
        lines += [f"{note}: {group.count:,} {group}" for note, group in self.notes.items()]
        if self.heldout_repeated:
            why = "so held-out loss is too low"
            lines.append(f"held-out rows that are training rows as well: {self.heldout_repeated:,}, {why}")
        return lines

    def row_lines(self) -> list[str]:
        """The report on a single row."""
        lines = [f"dropped: {reason}" for reason in self.dropped]
        if self.shortened.count:
            lines.append("cut after its last turn that fits")
        lines += [f"a row {note.removeprefix('rows ')}" for note in self.notes]
        return [*lines, self.unread_line()] if self.unread else lines

    def dropped_line(self) -> str:
        return _dropped_line(self.dropped)

    def shortened_line(self) -> str:
        return f"{_rows(self.shortened.count)} {self.shortened_how} {self.shortened}"

    def nothing_left(self) -> str:
        """Why there is nothing to train on, for an error."""
        reasons = [self.dropped_line()] if self.dropped else []
        if self.bad.count:
            reasons.append(f"{self.bad.count:,} bad, the first: {self.bad_error}")
        if self.unread:
            reasons.append(self.unread_line())
        return "; ".join(reasons) or "it has no rows"

    def unread_line(self) -> str:
        names = [name if len(name) <= 40 else f"{name[:37]}..." for name in self.unread[:UNREAD_NAMED]]
        more = f" and {len(self.unread) - UNREAD_NAMED:,} more" if len(self.unread) > UNREAD_NAMED else ""
        return f"columns not used: {', '.join(names)}{more}"

    def _heldout_part(self) -> str:
        if not self.heldout:
            return ", none held out"
        return f", {self.heldout:,} held out" + (f" from {self.heldout_source}" if self.heldout_source else "")


def _dropped_line(dropped: dict[str, RowGroup]) -> str:
    reasons = [f"{group.count:,} {reason} {group}" for reason, group in dropped.items()]
    return f"{sum(group.count for group in dropped.values()):,} dropped: {', '.join(reasons)}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
