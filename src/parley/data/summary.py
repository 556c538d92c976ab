"""What became of a data set's rows, in figures and in plain words."""

from __future__ import annotations

from array import array

import numpy as np
from pydantic import BaseModel, Field, PrivateAttr, computed_field

NAMED = 5
"""How many rows of each kind are named."""


class RowGroup(BaseModel):
    """Rows that share a property: how many, and where the first of them stand."""

    count: int = 0
    first: list[str] = Field(default_factory=list)

    def add(self, origin: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(origin)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        places = [origin.rpartition(" ") for origin in self.first]
        if len(places) > 1 and len({prefix for prefix, _, _ in places}) == 1:
            return f"({places[0][0]}s {', '.join(number for _, _, number in places)}{more})"
        return f"({', '.join(self.first)}{more})"


class DataSummary(BaseModel):
    """Rows in `rows`, kept ones split into `kept` (to train on) and `heldout`; tokens and lengths of the kept.

    With streaming the figures grow as rows are read.
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
    repeated: RowGroup = Field(default_factory=RowGroup)
    control_tokens: RowGroup = Field(default_factory=RowGroup)
    tokens: int = 0
    supervised_tokens: int = 0

    _lengths: array[int] = PrivateAttr(default_factory=lambda: array("i"))

    def restart(self) -> None:
        """Forget what was counted of the rows, before they are read again."""
        self.rows = self.kept = self.tokens = self.supervised_tokens = 0
        self.dropped, self.shortened, self.control_tokens = {}, RowGroup(), RowGroup()
        self._lengths = array("i")

    def drop(self, reason: str, origin: str) -> None:
        self.dropped.setdefault(reason, RowGroup()).add(origin)

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

    def lines(self) -> list[str]:
        """Everything in plain words, a line for each thing worth one."""
        so_far = " so far" if self.streaming else ""
        lines = [f"{_rows(self.rows)} read{so_far} from {self.source}: {self.reason}"]
        lines.append(f"{self.kept:,} kept to train on{self._heldout_words()}")
        if self.dropped:
            lines.append(self.dropped_words())
        if self.heldout_dropped:
            lines.append(f"of the rows to hold out, {_dropped_words(self.heldout_dropped)}")
        if self.shortened.count:
            lines.append(f"{_rows(self.shortened.count)} cut after their last turn that fits {self.shortened}")
        if self.kept:
            share = self.supervised_tokens / self.tokens
            lines.append(f"{self.tokens:,} tokens, {self.supervised_tokens:,} of them learned ({share:.0%})")
            lines.append(
                f"tokens a row: mean {self.length_mean:.0f}, median {self.length_median:.0f}, "
                f"95% up to {self.length_p95:.0f}, longest {self.length_max:,}"
            )
        if self.repeated.count:
            lines.append(f"rows that repeat an earlier one: {self.repeated.count:,} {self.repeated}")
        if self.control_tokens.count:
            held = f"{self.control_tokens.count:,} {self.control_tokens}"
            lines.append(f"rows with control tokens in their text, which the model reads as its own: {held}")
        if self.heldout_repeated:
            why = "so held-out loss flatters"
            lines.append(f"held-out rows that also stand among those to train on: {self.heldout_repeated:,}, {why}")
        return lines

    def dropped_words(self) -> str:
        return _dropped_words(self.dropped)

    def _heldout_words(self) -> str:
        if not self.heldout:
            return ", none held out"
        return f", {self.heldout:,} held out" + (f" from {self.heldout_source}" if self.heldout_source else "")


def _dropped_words(dropped: dict[str, RowGroup]) -> str:
    reasons = [f"{group.count:,} {reason} {group}" for reason, group in dropped.items()]
    return f"{sum(group.count for group in dropped.values()):,} dropped: {', '.join(reasons)}"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
