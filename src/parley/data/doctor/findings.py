"""What the doctor found: plain data, for the terminal, for JSON and for the report."""

from __future__ import annotations

from pydantic import BaseModel, Field

from parley.data.doctor.checks import BAD_ROW, NO_ANSWER, SEVERITIES, SURROGATE, Check, Severity
from parley.data.doctor.histogram import LogHistogram
from parley.data.doctor.row_reader import RowKind
from parley.data.summary import RowGroup

PERCENTILES = (5, 50, 95, 99)
WORST = 5
"""Findings printed before training; the report has all of them."""
IN_SUMMARY = frozenset({BAD_ROW.name, SURROGATE.name, NO_ANSWER.name})


class Lengths(BaseModel):
    """Lengths of rows: exact count, total, smallest and largest; percentiles within 1%."""

    count: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    percentiles: dict[str, int] = Field(default_factory=dict, description="By p5, p50, p95 and p99.")
    histogram: list[tuple[int, int]] = Field(
        default_factory=list, exclude=True, description="Length and number of rows of about that length."
    )

    @classmethod
    def of(cls, values: LogHistogram) -> Lengths:
        percentiles = {f"p{percent}": values.percentile(percent) for percent in PERCENTILES}
        return cls(
            count=values.count,
            total=values.total,
            smallest=values.smallest or 0,
            largest=values.largest,
            percentiles=percentiles,
            histogram=values.counts(),
        )

    def line(self) -> str:
        parts = [f"{percent[1:]}% up to {value:,}" for percent, value in self.percentiles.items()]
        parts[1:2] = [f"median {self.percentiles['p50']:,}"]
        return f"{self.smallest:,} to {self.largest:,}, mean {self.total / self.count:,.0f}; {', '.join(parts)}"


class Finding(BaseModel):
    """One kind of fault. what: which rows these are. example: an excerpt of the first, or what it repeats."""

    check: str
    severity: Severity
    what: str
    rows: RowGroup = Field(default_factory=RowGroup)
    share: float = Field(0.0, description="Of the rows that were read, from 0 to 1.")
    example: str = ""
    cure: str = ""

    @classmethod
    def of(cls, check: Check) -> Finding:
        return cls(check=check.name, severity=check.severity, what=check.what, cure=check.cure)

    def add(self, origin: str, example: str) -> None:
        self.rows.add(origin)
        self.example = self.example or example

    def share_text(self) -> str:
        percent = 100 * self.share
        return f"{percent:.1f}%" if percent >= 0.05 else "<0.1%"

    def line(self) -> str:
        """The finding in one line, with its cure."""
        return f"{self.severity}: {self.what}: {self.rows.count:,} {self.rows}; {self.cure}"


class Diagnosis(BaseModel):
    """What a data set holds, and its findings, worst first. Token figures are None without a tokenizer.

    `complete`: all rows were read; else `rows` were, of a longer stream.
    """

    source: str
    kind: RowKind = "supervised"
    format: str = ""
    rows: int = 0
    left_out: dict[str, int] = Field(default_factory=dict, description="Rows of them that data.drop leaves out.")
    complete: bool = True
    heldout_source: str | None = None
    heldout_rows: int = 0
    turns: Lengths = Field(default_factory=Lengths, description="Turns a row.")
    roles: dict[str, int] = Field(default_factory=dict, description="Turns by role.")
    characters: Lengths = Field(default_factory=Lengths, description="Characters a row.")
    tokens: Lengths | None = Field(
        None, description="Tokens a row, before model.max_seq_length; of pairs, each answer with its prompt counts."
    )
    supervised_tokens: int | None = None
    tokenised: int | None = Field(None, description="Rows (of pairs: answers) that were tokenised, where not all were.")
    max_length: int | None = None
    tokens_over: int | None = Field(None, description="Tokens past model.max_seq_length, of rows that are longer.")
    findings: list[Finding] = Field(default_factory=list)

    @property
    def supervised_share(self) -> float | None:
        if self.supervised_tokens is None or self.tokens is None or not self.tokens.total:
            return None
        return self.supervised_tokens / self.tokens.total

    def sort(self) -> None:
        """Worst first: by severity, then by number of rows."""
        self.findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), -finding.rows.count))

    def short_lines(self) -> list[str]:
        """The worst findings, a line each, without those that the summary of the data has already."""
        unsaid = [finding for finding in self.findings if finding.check not in IN_SUMMARY]
        worst = [finding for finding in unsaid if finding.severity != "note"][:WORST]
        rest = [finding for finding in unsaid if finding not in worst]
        lines = [finding.line() for finding in worst]
        if rest:
            names = ", ".join(f"{finding.check} {finding.rows.count:,}" for finding in rest)
            lines.append(f"also found: {names}; parley inspect {self.source} says more")
        return lines

    def facts(self) -> list[tuple[str, str]]:
        """What the data set holds: name and value."""
        read = f"{self.rows:,}" if self.complete else f"the first {self.rows:,} of a stream"
        facts = [("rows", read), ("format", self.format)]
        if self.left_out:
            facts.append(
                ("left out", ", ".join(f"{count:,} by data.drop={name}" for name, count in self.left_out.items()))
            )
        if self.heldout_source:
            facts.append(("held out", f"{self.heldout_rows:,} rows of {self.heldout_source}"))
        if self.turns.count:
            facts.append(("turns a row", self.turns.line()))
            facts.append(("turns by role", ", ".join(f"{role} {count:,}" for role, count in self.roles.items())))
        if self.characters.count:
            facts.append(("characters a row", self.characters.line()))
        return facts + self._token_facts()

    def _token_facts(self) -> list[tuple[str, str]]:
        if self.tokens is None or not self.tokens.count:
            return []
        facts = [("tokens an answer" if self.kind == "pairs" else "tokens a row", self.tokens.line())]
        if self.supervised_share is not None:
            facts.append(
                (
                    "supervised",
                    f"{self.supervised_tokens:,} tokens of {self.tokens.total:,} ({self.supervised_share:.0%})",
                )
            )
        if self.tokenised is not None:
            facts.append(("tokens are of", f"a sample of {self.tokenised:,}; all that may be too long are in it"))
        return facts
