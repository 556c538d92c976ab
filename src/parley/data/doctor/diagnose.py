"""One pass over a data set: counts, lengths, and every check.

Memory does not grow with the length of rows: percentiles come from histograms of fixed size, a row leaves 280 bytes of
hashes and its number (27 MB for 100,000 rows), and a finding keeps the first few rows it counts.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from parley.config import DataSection
from parley.data.doctor import checks
from parley.data.doctor.checks import ROW_CHECKS, TEXT_CHECKS, Check
from parley.data.doctor.conversation import Conversation, conversation_of
from parley.data.doctor.duplicates import Fingerprints, near_repeats, repeats
from parley.data.doctor.empty_answers import empty_answer
from parley.data.doctor.findings import Diagnosis, Finding, Lengths
from parley.data.doctor.histogram import LogHistogram
from parley.data.doctor.tokens import TokenCounts
from parley.data.example import Example
from parley.data.files import ERROR, Row
from parley.data.filtering import has_answer
from parley.data.recognition import RECOGNITION_ROWS, Recognised, recognise
from parley.data.sources import Rows, is_local, located, read_rows
from parley.errors import DataError
from parley.text import visible

STREAM_ROWS = 1000
"""Rows of a stream that are read: all of one may be too many to read before training."""
SHARED = frozenset({checks.HELDOUT.name, checks.NEAR_HELDOUT.name})
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


class Doctor:
    """The checks of one source's rows, as they come.

    keep: the checks of which every row is remembered. left_out: rows, by number, that are not checked.
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
        self.flagged: dict[str, set[int]] = {name: set() for name in keep}

    def read(self, rows: Iterable[tuple[str, Row]], format: Recognised) -> Iterator[tuple[int, Example]]:
        """Check each row, and yield those that can be understood with their numbers, from 0."""
        for origin, row in rows:
            self.origins.add(origin)
            if self.rows in self.left_out:
                self.rows += 1
                continue
            try:
                if ERROR in row:
                    raise DataError(row[ERROR])
                example = format.example(row, origin)
                self._check(row, example, format)
                yield self.rows, example
            except DataError as error:
                reason = str(error).removeprefix(f"{origin}: ")
                self.find(checks.SURROGATE if "lone surrogate" in reason else checks.BAD_ROW, self.rows, reason)
            self.rows += 1

    def _check(self, row: Row, example: Example, format: Recognised) -> None:
        conversation = conversation_of(example)
        self.fingerprints.add(conversation)
        self.fingerprinted.append(self.rows)
        if example.input_ids is not None:
            return
        self._measure(conversation)
        empty = empty_answer(row, example, format.format, self.data)
        if empty:
            self.find(checks.EMPTY_ANSWER, self.rows, empty)
        elif not has_answer(example, self.data.train_on):
            self.find(checks.NO_ANSWER, self.rows, "")
        for check in TEXT_CHECKS if empty else ROW_CHECKS:
            found = check.find(conversation)
            if found is not None:
                self.find(check, self.rows, found)

    def _measure(self, conversation: Conversation) -> None:
        self.characters.add(sum(len(text) for turn in conversation.turns for text in (turn.content, *turn.other)))
        if not conversation.plain:
            self.turns.add(len(conversation.turns))
            self.roles.update(turn.role for turn in conversation.turns)

    def origin_of(self, fingerprint: int) -> str:
        return self.origins[self.fingerprinted[fingerprint]]

    def find(self, check: Check, index: int, example: str) -> None:
        """Count row `index` as one of `check`'s."""
        self.findings.setdefault(check.name, Finding.of(check)).add(
            self.origins[index], visible(" ".join(example.split())[:SHOWN])
        )
        if check.name in self.keep:
            self.flagged[check.name].add(index)


def diagnose(data: DataSection, tokenizer: Any = None, max_length: int = 0) -> Diagnosis:
    """Check the rows of `data.source` and those of `data.heldout` against them; with `tokenizer`, count tokens too.

    Of a stream, STREAM_ROWS are read. Raises DataError where nothing can be read or recognised; a single row that
    cannot is a finding.
    """
    left_out = rows_to_drop(data) if data.drop else {}
    doctor = Doctor(data, left_out=left_out)
    counts = TokenCounts(tokenizer, data, max_length, doctor.find) if tokenizer is not None else None
    format = _examine(doctor, data, counts)
    heldout = _heldout(data)
    _find_repeated(doctor)
    findings = {**doctor.findings, **(_find_shared(doctor, heldout) if heldout else {})}
    diagnosis = Diagnosis(
        source=data.source,
        format=visible(format.reason),
        rows=doctor.rows,
        left_out=dict(Counter(left_out.values())),
        complete=not data.streaming or doctor.rows < STREAM_ROWS,
        heldout_source=data.heldout if heldout else None,
        heldout_rows=heldout.rows if heldout else 0,
        turns=Lengths.of(doctor.turns),
        roles=dict(doctor.roles.most_common()),
        characters=Lengths.of(doctor.characters),
        findings=list(findings.values()),
    )
    if counts is not None:
        diagnosis.tokens, diagnosis.supervised_tokens = Lengths.of(counts.lengths), counts.supervised
        diagnosis.max_length, diagnosis.tokens_over = max_length, counts.over
    for finding in diagnosis.findings:
        of = diagnosis.heldout_rows if finding.check in SHARED else diagnosis.rows
        finding.share = finding.rows.count / of
        if finding.check == checks.OVERLONG.name and counts is not None:
            finding.cure = counts.overlong_cure()
    diagnosis.sort()
    return diagnosis


def rows_to_drop(data: DataSection) -> dict[int, str]:
    """The rows that `data.drop` leaves out, by their number from 0, each with the check that found it."""
    doctor = Doctor(data, frozenset(data.drop))
    _examine(doctor, data)
    _find_repeated(doctor)
    heldout = _heldout(data) if SHARED.intersection(data.drop) else None
    if heldout is not None:
        _flag_shared(doctor, heldout)
    return {number: name for name in reversed(data.drop) for number in doctor.flagged[name]}


def _heldout(data: DataSection) -> Doctor | None:
    """The rows of the source `data.heldout`, read for their fingerprints; None without one.

    A share of the data (5%) is split by a hash of each conversation, so that both sides share none.
    """
    if not data.heldout or data.heldout_share is not None:
        return None
    section = heldout_section(data)
    doctor = Doctor(section)
    _examine(doctor, section)
    return doctor


def heldout_section(data: DataSection) -> DataSection:
    """`data` for the rows of `data.heldout`."""
    assert data.heldout is not None
    source, _, split = data.heldout.partition("#")
    changes: dict[str, Any] = {"source": source, "split": split or "train", "limit": None, "streaming": False}
    changes |= {"heldout": None, "drop": []}
    if is_local(source):
        changes |= {"subset": None, "revision": None}  # those of a training set on the hub
    return data.model_copy(update=changes)


def _examine(doctor: Doctor, data: DataSection, counts: TokenCounts | None = None) -> Recognised:
    rows = read_rows(data.source, data, keep_bad=True)
    format = recognise(_readable(rows), data, data.source)
    for number, example in doctor.read(islice(located(rows), STREAM_ROWS if data.streaming else None), format):
        if counts is not None:
            counts.add(number, example)
    if counts is not None:
        counts.flush()
    return format


def _readable(rows: Rows) -> Iterator[tuple[str, Row]]:
    return islice(((origin, row) for origin, row in located(rows) if ERROR not in row), RECOGNITION_ROWS)


def _find_repeated(doctor: Doctor) -> None:
    """Count rows that repeat an earlier one."""
    prints = doctor.fingerprints
    everything = np.ones(len(prints), dtype=bool)
    exact = repeats(prints.exact(), everything, everything)
    single = everything.copy()
    single[list(exact)] = False
    near = near_repeats(prints.signatures(), single, single)
    for check, pairs in ((checks.DUPLICATE, exact), (checks.NEAR_DUPLICATE, near)):
        for target, source in sorted(pairs.items()):
            doctor.find(check, doctor.fingerprinted[target], f"the first repeats {doctor.origin_of(source)}")


def _find_shared(doctor: Doctor, heldout: Doctor) -> dict[str, Finding]:
    """Held-out rows that repeat a training row, by check."""
    found: dict[str, Finding] = {}
    count = len(doctor.fingerprints)
    for check, pairs in _shared(doctor.fingerprints, heldout.fingerprints):
        for target, source in sorted(pairs.items()):
            finding = found.setdefault(check.name, Finding.of(check))
            finding.add(heldout.origin_of(target - count), f"the first repeats {doctor.origin_of(source)}")
    return found


def _flag_shared(doctor: Doctor, heldout: Doctor) -> None:
    """Flag the training rows that repeat a held-out one."""
    count = len(heldout.fingerprints)
    for check, pairs in _shared(heldout.fingerprints, doctor.fingerprints):
        if check.name in doctor.keep:
            doctor.flagged[check.name].update(doctor.fingerprinted[target - count] for target in pairs)


def _shared(first: Fingerprints, second: Fingerprints) -> Iterator[tuple[Check, dict[int, int]]]:
    """Rows of `second` that repeat one of `first`, exactly and nearly; numbers of `second` follow those of `first`."""
    both = first.extend(second)
    sources = np.arange(len(both)) < len(first)
    exact = repeats(both.exact(), sources, ~sources)
    yield checks.HELDOUT, exact
    others = ~sources
    others[list(exact)] = False
    yield checks.NEAR_HELDOUT, near_repeats(both.signatures(), sources, others)
