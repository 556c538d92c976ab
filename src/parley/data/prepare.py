"""From a source to what the trainer takes: rows -> examples -> ids and labels, with rows held out and counted.

T: tokens of a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from rich.console import Console
from rich.progress import track

from parley.config import DataSection
from parley.data.bad_rows import BadRow, BadRows, LeftOut
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.doctor.diagnose import conclude, rows_to_drop
from parley.data.doctor.examine import Doctor
from parley.data.doctor.findings import Diagnosis
from parley.data.doctor.row_reader import CheckedRow, SupervisedReader
from parley.data.example import Example
from parley.data.files import ERROR, Row, readable_rows
from parley.data.filtering import AHEAD, BATCH, Candidate, render_examples, split_row
from parley.data.heldout_split import heldout_section, is_heldout, sampled_rows
from parley.data.packing import LOSS_WEIGHTS, ORIGIN
from parley.data.recognition import RECOGNITION_ROWS, Recognised, recognise
from parley.data.render import Rendered, pin_date, pin_settings
from parley.data.sources import Rows, located, read_rows
from parley.data.summary import DataSummary
from parley.errors import DataError

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), ORIGIN: Value("string")})
WEIGHTS = List(Value("float32"))
PREVIEWED = 8
STREAM_BATCH = 16
ARROW_BATCH = 4096
"""Rows converted to Arrow at once."""
PROGRESS_FROM = 5000
"""Rows from which on a progress bar is shown."""
STREAM_HELDOUT = 64
"""Rows of a stream to evaluate on, where a share of it is held out: all of them are only known at its end."""


@dataclass
class Prepared:
    """Data ready to train on. `train` and `heldout` have columns input_ids and labels, each (T,), with labels
    IGNORE_INDEX where not supervised, and the row's origin; where a row has loss weights other than 1, also a column of
    them, (T,), null in rows without. `heldout_examples` are in the order of `heldout`'s rows;
    `preview` and `preview_origins` are the first training rows; `bad_rows` are those skipped; `diagnosis` is what the
    data doctor found, where it was asked and the rows are no stream.
    """

    train: Dataset | IterableDataset
    heldout: Dataset | None
    heldout_examples: list[Example]
    summary: DataSummary
    bad_rows: BadRows
    preview: list[Rendered] = field(default_factory=list)
    preview_origins: list[str] = field(default_factory=list)
    diagnosis: Diagnosis | None = None


def prepare(
    data: DataSection, tokenizer: Any, max_length: int, *, diagnosed: bool = False, keep_tokens: bool = True
) -> Prepared:
    """Read, recognise, render and split the data set that `data` describes.

    Rows longer than `max_length` tokens follow `data.overlong`, rows that cannot be read or rendered follow
    `data.bad_rows`; rows without an answer, or without a supervised token, are dropped. Held out are the rows of
    `data.heldout` (its split may follow after a `#`), or the share of the source that it names, by a hash of each
    conversation; or else `data.heldout_rows` of the source: at most a tenth, sampled with a fixed seed; of a stream the
    first ones. The summary reports all of it.

    diagnosed: have the data doctor check the rows in the same pass. keep_tokens: False leaves `train` empty, for who
    wants the summary alone: it counts the rows all the same.

    Raises DataError in one line: a source that cannot be read or recognised, a bad row, or nothing left to train on.
    """
    # Before any row is rendered: the changed template is saved with the checkpoint, so serving writes the same ids.
    pin_date(tokenizer, data.date)
    pin_settings(tokenizer, data.template)
    heldout_rows = 0 if data.heldout else data.heldout_rows
    left_out = rows_to_drop(data, "supervised") if data.drop else {}
    source_rows = read_rows(data.source, data, keep_bad=True)
    doctor = Doctor(data, left_out=left_out) if diagnosed else None
    rows = RowRenderer(source_rows, tokenizer, data, max_length, data.source, left_out=left_out, doctor=doctor)
    if rows.summary.streaming:
        prepared, trained = rows.stream(heldout_rows)
    else:
        prepared, trained = rows.split(heldout_rows, keep_tokens)
        if doctor is not None:
            prepared.diagnosis = conclude(doctor, data, rows.reader, for_training=True)
    if data.heldout_share is not None:
        _check_share(prepared, data)
    elif data.heldout:
        _hold_out(prepared, trained, data, tokenizer, max_length)
    return prepared


def render_rows(
    rows: Rows, tokenizer: Any, data: DataSection, max_length: int, *, where: str
) -> tuple[Dataset | IterableDataset, DataSummary]:
    """`rows` in memory as input_ids and labels, each (T,), with their origins; and their summary.

    `where` names them in messages. Raises as `prepare` does.
    """
    renderer = RowRenderer(rows, tokenizer, data, max_length, where, prefix=where)
    prepared, _ = renderer.stream(0) if renderer.summary.streaming else renderer.split(0)
    return prepared.train, prepared.summary


def read_examples(data: DataSection) -> tuple[Recognised, Iterator[Example]]:
    """How `data.source` was recognised, and its examples in their order, before anything is dropped or held out.

    With `data.bad_rows: skip`, rows that cannot be understood are left out.
    """
    rows = read_rows(data.source, data, keep_bad=True)
    format = recognise(readable_rows(located(rows), RECOGNITION_ROWS), data, data.source)
    return format, _good((example for _, example in _examples(rows, format)), BadRows(data))


def _good(examples: Iterable[Example | BadRow], bad_rows: BadRows) -> Iterator[Example]:
    for example in examples:
        bad_rows.rows += 1
        if isinstance(example, BadRow):
            bad_rows.handle(example)
        else:
            yield example


def _examples(rows: Iterable[Row], format: Recognised, prefix: str = "") -> Iterator[tuple[Row, Example | BadRow]]:
    for origin, row in located(rows, prefix):
        if ERROR in row:
            yield row, BadRow(origin, DataError(row[ERROR]))
            continue
        try:
            yield row, format.example(row, origin)
        except DataError as error:
            yield row, BadRow(origin, error, row)


class _TokenColumns:
    """Rendered rows collected for a Dataset of `FEATURES`. `digests` identify rows of the same ids.

    keep: False for the digests alone.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.digests: list[bytes] = []
        self.tables: list[Dataset] = []
        self.pending: list[dict[str, Any]] = []

    def add(self, rendered: Rendered, origin: str) -> bytes:
        ids_T = array("i", rendered.input_ids)
        digest = hashlib.blake2b(ids_T, digest_size=16).digest()
        self.digests.append(digest)
        if self.keep:
            self.pending.append(_columns(rendered, ids_T, origin))
            if len(self.pending) == ARROW_BATCH:
                self._to_arrow()
        return digest

    def dataset(self) -> Dataset:
        if self.pending or not self.tables:
            self._to_arrow()
        tables = self.tables
        if any(LOSS_WEIGHTS in table.column_names for table in tables):
            without = ((table, LOSS_WEIGHTS not in table.column_names) for table in tables)
            tables = [_with_weights(table, [None] * len(table)) if lacks else table for table, lacks in without]
        return concatenate_datasets(tables)

    def _to_arrow(self) -> None:
        columns = {name: [row[name] for row in self.pending] for name in FEATURES}
        features = None if self.pending else FEATURES  # int32 arrays carry their type: five times as fast
        table = Dataset.from_dict(columns, features=features)
        if any(LOSS_WEIGHTS in row for row in self.pending):
            table = _with_weights(table, [row.get(LOSS_WEIGHTS) for row in self.pending])
        self.tables.append(table)
        self.pending = []


class RowRenderer:
    """Recognises, renders and filters rows, and counts them in `summary`. `prefix` names rows without a file.

    left_out: the checks of `data.drop` by the numbers, from 0, of the rows they found. doctor: what checks each row
    that `split` reads.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        data: DataSection,
        max_length: int,
        where: str,
        prefix: str = "",
        left_out: Mapping[int, str] | None = None,
        doctor: Doctor | None = None,
    ) -> None:
        self.rows, self.tokenizer, self.data, self.max_length = rows, tokenizer, data, max_length
        self.where, self.prefix, self.left_out = where, prefix, left_out or {}
        self.format = recognise(readable_rows(located(rows, prefix), RECOGNITION_ROWS), data, where)
        self.doctor, self.reader = doctor, SupervisedReader(self.format)
        self.bad_rows = BadRows(data, advise=not prefix)  # else there are no settings to change
        streaming = isinstance(rows, IterableDataset)
        self.summary = DataSummary(
            source=where, format=self.format.name, reason=self.format.reason, streaming=streaming
        )

    def outcomes(self, batch: int = BATCH, ahead: int = AHEAD) -> Iterator[tuple[Example, Rendered] | None]:
        """For each row in turn its example and rendering, or None where it is dropped or skipped."""
        outcomes = render_examples(
            self._examples(),
            self.tokenizer,
            self.data,
            self.max_length,
            self.summary,
            batch,
            ahead,
            self.bad_rows,
        )
        for outcome in outcomes:
            self.summary.rows += 1
            yield outcome
        self.summary.unread = self.format.unread_with(self.tokenizer.chat_template)

    def _examples(self) -> Iterator[Candidate]:
        for number, (row, example) in enumerate(_examples(self.rows, self.format, self.prefix)):
            left_out = number in self.left_out
            if self.doctor is not None:
                self.doctor.add(example.origin, None if left_out else self._checked(row, example))
            yield LeftOut(example.origin, self.left_out[number]) if left_out else example

    def _checked(self, row: Row, example: Example | BadRow) -> CheckedRow | DataError:
        if isinstance(example, BadRow):
            return example.error
        try:
            return self.reader.checked(row, example)
        except DataError as error:
            return error

    def split(self, heldout_rows: int, keep_tokens: bool = True) -> tuple[Prepared, set[bytes]]:
        """All rows, some of them held out, with the digests of the training rows."""
        count = len(self.rows)
        is_chosen = self._chosen(heldout_rows)
        train, heldout, seen = _TokenColumns(keep_tokens), _TokenColumns(), set[bytes]()
        examples: list[Example] = []
        preview: list[Rendered] = []
        origins: list[str] = []
        for index, outcome in enumerate(_with_progress(self.outcomes(), count)):
            if outcome is None:
                continue
            example, rendered = outcome
            if is_chosen(index, example):
                self.add(heldout, rendered, example.origin)
                examples.append(example)
                continue
            digests = self.add(train, rendered, example.origin)
            # With `overlong: split` a row has several parts; it repeats earlier rows only if all its parts do.
            if digests and seen.issuperset(digests):
                self.summary.repeated.add(example.origin)
            seen.update(digests)
            self._count(rendered)
            if len(preview) < PREVIEWED:
                preview.append(rendered)
                origins.append(example.origin)
        self._check_any()
        self.summary.heldout = len(examples)
        self.summary.heldout_repeated = sum(digest in seen for digest in heldout.digests)
        heldout_rows_T = heldout.dataset() if examples else None
        prepared = Prepared(train.dataset(), heldout_rows_T, examples, self.summary, self.bad_rows, preview, origins)
        return prepared, seen

    def _chosen(self, heldout_rows: int) -> Callable[[int, Example], bool]:
        """Whether a row, by its index and its words, is held out: the share of `data.heldout`, or `heldout_rows`."""
        share = self.data.heldout_share
        if share is not None:
            return lambda index, example: is_heldout(example, share)
        sampled = sampled_rows(heldout_rows, len(self.rows))
        return lambda index, example: index in sampled

    def stream(self, heldout_rows: int) -> tuple[Prepared, set[bytes]]:
        """A stream that renders as it is read, after its first rows are held out. The summary counts its last pass.

        With a share held out, its first rows are those to evaluate on, and none of it is trained on.
        """
        heldout, examples = _TokenColumns(), []
        share = self.data.heldout_share
        kept = (outcome for outcome in self.outcomes(STREAM_BATCH, ahead=0) if outcome is not None)
        if share is not None:
            heldout_rows = STREAM_HELDOUT
            kept = (outcome for outcome in kept if is_heldout(outcome[0], share))
        for example, rendered in islice(kept, heldout_rows):
            self.add(heldout, rendered, example.origin)
            examples.append(example)
        # Rows read rather than rows held out: rows dropped in between have to be skipped as well.
        used = self.summary.rows if share is None else 0

        def training_rows() -> Iterator[tuple[Example, Rendered]]:
            # The generator starts again at every epoch; without a reset the counts would add up over epochs.
            self.summary.restart()
            for outcome in islice(self.outcomes(STREAM_BATCH, ahead=0), used, None):
                if outcome is not None and (share is None or not is_heldout(outcome[0], share)):
                    self._count(outcome[1])
                    yield outcome

        def columns() -> Iterator[dict[str, Any]]:
            for example, rendered in training_rows():
                for part in self._parts(rendered):
                    yield {LOSS_WEIGHTS: None, **_columns(part, array("i", part.input_ids), example.origin)}

        # No read-ahead on streams: the first batch would wait for 1,280 rows, and rows not yet used would be counted.
        shown = list(islice(training_rows(), PREVIEWED))
        self._check_any()
        self.summary.heldout, self.summary.unread = len(examples), self.format.unread_with(self.tokenizer.chat_template)
        # Whether a later row has loss weights is not known yet.
        features = Features({**FEATURES, LOSS_WEIGHTS: WEIGHTS})
        train = IterableDataset.from_generator(columns, features=features)
        preview, origins = [rendered for _, rendered in shown], [example.origin for example, _ in shown]
        heldout_rows_T = heldout.dataset() if examples else None
        # No digests: the rows of a stream are not known before training, so repeats cannot be counted.
        return Prepared(train, heldout_rows_T, examples, self.summary, self.bad_rows, preview, origins), set()

    def _parts(self, rendered: Rendered) -> list[Rendered]:
        return split_row(rendered, self.data, self.max_length)

    def add(self, tokens: _TokenColumns, rendered: Rendered, origin: str) -> list[bytes]:
        return [tokens.add(part, origin) for part in self._parts(rendered)]

    def _count(self, rendered: Rendered) -> None:
        for part in self._parts(rendered):
            self.summary.keep(len(part.input_ids), sum(part.mask[1:]))

    def _check_any(self) -> None:
        self.summary.unread = self.format.unread_with(self.tokenizer.chat_template)
        if not self.summary.kept:
            raise DataError(f"{self.where}: nothing left to train on; {self.summary.nothing_left()}")
        if not self.summary.streaming:
            self.bad_rows.check()


def _check_share(prepared: Prepared, data: DataSection) -> None:
    """Say in the summary what the held-out share means. Raises DataError where no row falls into it."""
    summary = prepared.summary
    if prepared.heldout is None:
        raise DataError(
            f"data.heldout {data.heldout}: none of the {summary.kept:,} rows of {data.source} falls into that share; "
            "raise it, or set data.heldout_rows or a file"
        )
    rest = ", the first of them to evaluate on and none trained on" if summary.streaming else ""
    summary.heldout_source = f"{data.heldout} of the conversations, split by their hash{rest}"


def _hold_out(prepared: Prepared, trained: set[bytes], data: DataSection, tokenizer: Any, max_length: int) -> None:
    """Put the rows of `data.heldout` into `prepared`."""
    assert data.heldout is not None
    section = heldout_section(data)
    source = section.source
    rows = read_rows(source, section, keep_bad=True)
    renderer = RowRenderer(rows, tokenizer, section, max_length, source, prefix="held-out")
    tokens = _TokenColumns()
    for outcome in renderer.outcomes():
        if outcome is not None:
            prepared.heldout_examples.append(outcome[0])
            renderer.add(tokens, outcome[1], outcome[0].origin)
    summary = prepared.summary
    summary.heldout, summary.heldout_source = len(tokens.digests), data.heldout
    summary.heldout_dropped = dict(renderer.summary.dropped)
    if renderer.summary.bad.count:
        summary.heldout_dropped["bad"] = renderer.summary.bad
    summary.heldout_repeated = sum(digest in trained for digest in tokens.digests)
    if not tokens.digests:
        raise DataError(f"data.heldout {source}: nothing left to evaluate on; {renderer.summary.nothing_left()}")
    prepared.heldout = tokens.dataset()


def _columns(rendered: Rendered, id_array: array[int], origin: str) -> dict[str, Any]:
    # array and bytes read a list of Python numbers faster than numpy does, and this is done for every row.
    ids_T = np.frombuffer(id_array, dtype=np.int32)
    supervised_T = np.frombuffer(bytes(rendered.mask), dtype=np.bool_)
    labels_T = np.where(supervised_T, ids_T, np.int32(IGNORE_INDEX))
    # Arrow holds UTF-8; a file's name may be none.
    columns = {"input_ids": ids_T, "labels": labels_T, ORIGIN: origin.encode(errors="replace").decode()}
    if rendered.weights is not None:
        columns[LOSS_WEIGHTS] = np.array(rendered.weights, dtype=np.float32)
    return columns


def _with_weights(table: Dataset, weights: list[Any]) -> Dataset:
    return table.add_column(LOSS_WEIGHTS, weights, feature=WEIGHTS)


def _with_progress(outcomes: Iterator[Any], count: int) -> Iterator[Any]:
    console = Console(stderr=True)
    if count < PROGRESS_FROM or not console.is_terminal:
        return outcomes  # a hidden bar would still count every row
    return iter(track(outcomes, "rendering rows", total=count, console=console, transient=True))
