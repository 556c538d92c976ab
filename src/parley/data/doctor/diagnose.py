"""One pass over a data set: counts, lengths, and every check.

Memory does not grow with the length of rows: percentiles come from histograms of fixed size, a row leaves 280 bytes of
hashes and its number (27 MB for 100,000 rows), and a finding keeps the first few rows it counts.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from parley.config import DataSection
from parley.data.doctor import checks
from parley.data.doctor.examine import Doctor
from parley.data.doctor.findings import Diagnosis, Lengths
from parley.data.doctor.repeated_rows import SHARED, find_repeated, find_shared, flag_shared, sides
from parley.data.doctor.row_reader import RowKind, RowReader, row_reader
from parley.data.doctor.tokens import TokenCounts
from parley.data.heldout_split import heldout_section, sampled_rows
from parley.data.sources import located, read_rows
from parley.text import visible

STREAM_ROWS = 1000
"""Rows of a stream that are read: all of one may be too many to read before training."""


def diagnose(
    data: DataSection,
    tokenizer: Any = None,
    max_length: int = 0,
    for_training: bool = False,
    kind: RowKind | None = None,
) -> Diagnosis:
    """Check the rows of `data.source` and those of `data.heldout` against them; with `tokenizer`, count tokens too.

    for_training: the rows that `data.heldout_rows` sets aside are compared with the others as well. kind: what the
    training method learns from; None: what the rows' columns show.

    Of a stream, STREAM_ROWS are read. Raises DataError where nothing can be read or recognised; a single row that
    cannot is a finding.
    """
    left_out = rows_to_drop(data, kind) if data.drop else {}
    doctor = Doctor(data, left_out=left_out)
    counts = TokenCounts(tokenizer, data, max_length, doctor.find) if tokenizer is not None else None
    reader = _examine(doctor, data, kind, counts)
    diagnosis = conclude(doctor, data, reader, for_training)
    if counts is not None:
        diagnosis.tokens, diagnosis.supervised_tokens = Lengths.of(counts.lengths), counts.supervised
        diagnosis.tokenised = counts.tokenised if counts.is_sample else None
        diagnosis.max_length, diagnosis.tokens_over = max_length, counts.over
    for finding in diagnosis.findings:
        if finding.check == checks.OVERLONG.name and counts is not None:
            finding.cure = counts.overlong_cure()
    return diagnosis


def conclude(doctor: Doctor, data: DataSection, reader: RowReader, for_training: bool) -> Diagnosis:
    """The diagnosis of rows that were all given to `doctor`; the rows of a source `data.heldout` are read here."""
    heldout = _heldout(doctor, data, reader, for_training)
    find_repeated(doctor)
    for finding in doctor.findings.values():
        finding.share = finding.rows.count / doctor.rows
    diagnosis = Diagnosis(
        source=data.source,
        kind=reader.kind,
        format=visible(reader.reason),
        rows=doctor.rows,
        left_out=dict(Counter(doctor.left_out.values())),
        complete=not data.streaming or doctor.rows < STREAM_ROWS,
        heldout_source=data.heldout if data.heldout_share is None else None,
        heldout_rows=heldout.rows if heldout else 0,
        turns=Lengths.of(doctor.turns),
        roles=dict(doctor.roles.most_common()),
        characters=Lengths.of(doctor.characters),
        findings=[*doctor.findings.values(), *find_shared(*sides(doctor, heldout))],
    )
    diagnosis.sort()
    return diagnosis


def rows_to_drop(data: DataSection, kind: RowKind | None) -> dict[int, str]:
    """The rows that `data.drop` leaves out, by their number from 0, each with the check that found it."""
    doctor = Doctor(data, frozenset(data.drop))
    reader = _examine(doctor, data, kind)
    find_repeated(doctor)
    if SHARED.intersection(data.drop):
        flag_shared(*sides(doctor, _heldout(doctor, data, reader, for_training=True)))
    return {number: name for name in reversed(data.drop) for number in doctor.flagged[name]}


def _heldout(doctor: Doctor, data: DataSection, reader: RowReader, for_training: bool) -> Doctor | None:
    """The rows of the source `data.heldout`, read for their fingerprints; None where held-out rows are the data's own.

    Those of a share are in `doctor.heldout` already; the sampled ones are put there.
    """
    if data.heldout and data.heldout_share is None:
        section = heldout_section(data)
        heldout = Doctor(section)
        _examine(heldout, section, reader.kind)
        return heldout
    if not data.heldout and for_training and not data.streaming:
        doctor.heldout = sampled_rows(data.heldout_rows, doctor.rows)
    return None


def _examine(doctor: Doctor, data: DataSection, kind: RowKind | None, counts: TokenCounts | None = None) -> RowReader:
    rows = read_rows(data.source, data, keep_bad=True)
    reader = row_reader(located(rows), data, kind)
    for number, examples in doctor.read(islice(located(rows), STREAM_ROWS if data.streaming else None), reader):
        if counts is not None:
            counts.add(number, examples)
    if counts is not None:
        counts.flush()
    return reader
