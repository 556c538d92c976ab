"""The checks of one source's rows, as they are read."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from parley.config import DataSection
from parley.data.doctor import checks
from parley.data.doctor.checks import ORDER_CHECKS, TEXT_CHECKS, Check, RowCheck
from parley.data.doctor.conversation import Conversation
from parley.data.doctor.duplicates import Fingerprints
from parley.data.doctor.findings import Finding
from parley.data.doctor.histogram import LogHistogram
from parley.data.doctor.row_reader import CheckedRow, RowReader
from parley.data.example import Example
from parley.data.files import ERROR, Row
from parley.data.filtering import has_answer
from parley.data.heldout_split import is_heldout
from parley.errors import DataError
from parley.text import visible

SHOWN = 80
"""Characters of an excerpt."""


class Origins:
    """Where rows come from, such as "rows.jsonl line 12", in 12 bytes a row."""

    def __init__(self) -> None:
        self._numbers, self._prefixes = array("Q"), array("I")
        self._ids: dict[str, int] = {}

    def add(self, origin: str) -> None:
        prefix, _, number = origin.rpartition(" ")
        self._numbers.append(int(number))
        self._prefixes.append(self._ids.setdefault(prefix, len(self._ids)))

    def __getitem__(self, index: int) -> str:
        return f"{visible(list(self._ids)[self._prefixes[index]])} {self._numbers[index]}".strip()


def _read(row: Row, origin: str, reader: RowReader) -> CheckedRow | DataError:
    if ERROR in row:
        return DataError(row[ERROR])
    try:
        return reader.read(row, origin)
    except DataError as error:
        return error


class Doctor:
    """The checks of one source's rows, as they come.

    keep: the checks of which every row is remembered. left_out: rows, by number, that are not checked. `heldout`: the
    numbers of the rows that the share in `data.heldout` sets aside.
    """

    def __init__(
        self, data: DataSection, keep: frozenset[str] = frozenset(), left_out: Mapping[int, str] | None = None
    ) -> None:
        self.data, self.keep, self.left_out = data, keep, left_out or {}
        self.rows = 0
        self.origins = Origins()
        self.fingerprints = Fingerprints()
        self.fingerprinted = array("Q")  # the row of each fingerprint: rows that cannot be read have none
        self.turns, self.characters = LogHistogram(), LogHistogram()
        self.roles: Counter[str] = Counter()
        self.findings: dict[str, Finding] = {}
        self.heldout: set[int] = set()
        self._last_found: dict[str, int] = {}
        self.flagged: dict[str, set[int]] = {name: set() for name in keep}

    def read(self, rows: Iterable[tuple[str, Row]], reader: RowReader) -> Iterator[tuple[int, list[Example]]]:
        """Check each row, and yield those that can be understood with their numbers, from 0."""
        for origin, row in rows:
            if self.rows in self.left_out:
                self.add(origin, None)
                continue
            checked = _read(row, origin, reader)
            self.add(origin, checked)
            if isinstance(checked, CheckedRow):
                yield self.rows - 1, checked.examples

    def add(self, origin: str, row: CheckedRow | DataError | None) -> None:
        """Check the next row: one that cannot be read is its error, one that is left out None."""
        self.origins.add(origin)
        if isinstance(row, CheckedRow):
            self._check(row)
        elif row is not None:
            reason = str(row).removeprefix(f"{origin}: ")
            self.find(checks.SURROGATE if "lone surrogate" in reason else checks.BAD_ROW, self.rows, reason)
        self.rows += 1

    def _check(self, row: CheckedRow) -> None:
        self.fingerprints.add(row.text)
        self.fingerprinted.append(self.rows)
        example = row.examples[0]
        if self.data.heldout_share is not None and is_heldout(example, self.data.heldout_share):
            self.heldout.add(self.rows)
        if example.input_ids is not None:
            return
        self._measure(row)
        if row.empty:
            self.find(checks.EMPTY_ANSWER, self.rows, row.empty)
        elif not has_answer(example, self.data.train_on):
            self.find(checks.NO_ANSWER, self.rows, "")
        self._find_all(TEXT_CHECKS, row.text)
        if not row.empty:
            for dialogue in row.dialogues:
                self._find_all(ORDER_CHECKS, dialogue)

    def _find_all(self, asked: Sequence[RowCheck], conversation: Conversation) -> None:
        for check in asked:
            found = check.find(conversation)
            if found is not None:
                self.find(check, self.rows, found)

    def _measure(self, row: CheckedRow) -> None:
        self.characters.add(sum(len(text) for turn in row.text.turns for text in (turn.content, *turn.other)))
        if not row.text.plain:
            self.turns.add(len(row.dialogues[0].turns))
            self.roles.update(turn.role for turn in row.text.turns)

    def origin_of(self, fingerprint: int) -> str:
        return self.origins[self.fingerprinted[fingerprint]]

    def find(self, check: Check, index: int, example: str) -> None:
        """Count row `index` as one of `check`'s, once: both answers of a pair may show it."""
        if self._last_found.get(check.name) == index:
            return
        self._last_found[check.name] = index
        self.findings.setdefault(check.name, Finding.of(check)).add(
            self.origins[index], visible(" ".join(example.split())[:SHOWN])
        )
        if check.name in self.keep:
            self.flagged[check.name].add(index)
