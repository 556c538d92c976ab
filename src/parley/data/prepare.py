"""From a source to what the trainer takes: rows -> examples -> ids and labels, with rows held out and counted.

T: tokens of a row.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from rich.console import Console
from rich.progress import track

from parley.config import DataSection
from parley.data.conversation import Example
from parley.data.filtering import AHEAD, BATCH, render_examples
from parley.data.formats import Format, recognise
from parley.data.render import Rendered, pin_date
from parley.data.sources import Rows, located, read_rows
from parley.data.summary import DataSummary
from parley.data.tokens import IGNORE_INDEX
from parley.errors import DataError

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
PREVIEWED = 8
LOOKED_AT = 20
"""Rows looked at to recognise a format."""
STREAM_BATCH = 16
CHUNK = 4096
"""Rows moved to Arrow at once."""
LONG_WORK = 5000
"""Rows from which on a progress bar is shown."""
HELDOUT_SEED = 0
HELDOUT_SHARE = 10
"""At most one row in ten is held out."""


@dataclass
class Prepared:
    """Data ready to train on. `train` and `heldout` have columns input_ids and labels, each (T,), with labels
    IGNORE_INDEX where nothing is learned. `heldout_examples` are in the order of `heldout`'s rows; `preview` and
    `preview_origins` are the first training rows.
    """

    train: Dataset | IterableDataset
    heldout: Dataset | None
    heldout_examples: list[Example]
    summary: DataSummary
    preview: list[Rendered] = field(default_factory=list)
    preview_origins: list[str] = field(default_factory=list)


def prepare(data: DataSection, tokenizer: Any, max_length: int) -> Prepared:
    """Read, recognise, render and split the data set that `data` describes.

    Rows longer than `max_length` tokens follow `data.overlong`; rows without an answer, or with nothing else to
    learn, are dropped. Held out are the rows of `data.heldout` (its split may follow after a `#`), or else
    `data.heldout_rows` of the source: at most a tenth, drawn with a fixed seed; of a stream the first ones. The
    summary says all of it.

    Raises DataError in one line: a source that cannot be read or recognised, a broken row, or nothing left to learn.
    """
    pin_date(tokenizer, data.date)
    heldout_rows = 0 if data.heldout else data.heldout_rows
    rows = _RowRenderer(read_rows(data.source, data), tokenizer, data, max_length, data.source)
    prepared, trained = rows.stream(heldout_rows) if rows.summary.streaming else rows.split(heldout_rows)
    if data.heldout:
        _hold_out(prepared, trained, data, tokenizer, max_length)
    return prepared


def render_rows(
    rows: Rows, tokenizer: Any, data: DataSection, max_length: int, *, where: str
) -> tuple[Dataset | IterableDataset, DataSummary]:
    """`rows` that are at hand already as input_ids and labels, each (T,), and what became of them.

    `where` names them in messages. Raises as `prepare` does.
    """
    renderer = _RowRenderer(rows, tokenizer, data, max_length, where, prefix=where)
    prepared, _ = renderer.stream(0) if renderer.summary.streaming else renderer.split(0)
    return prepared.train, prepared.summary


def read_examples(data: DataSection) -> tuple[Format, Iterator[Example]]:
    """How `data.source` was recognised, and its examples in their order, before anything is dropped or held out."""
    rows = read_rows(data.source, data)
    format = recognise(islice(located(rows), LOOKED_AT), data, data.source)
    return format, (format.example(row, origin) for origin, row in located(rows))


class _Pile:
    """Rendered rows gathered for a Dataset of `FEATURES`; `digests` tell whether a row was there before."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.parts: list[Dataset] = []
        self.loose: list[dict[str, np.ndarray]] = []

    def add(self, rendered: Rendered) -> bytes:
        row = _columns(rendered)
        self.loose.append(row)
        if len(self.loose) == CHUNK:
            self._pack()
        self.digests.append(hashlib.blake2b(row["input_ids"].tobytes(), digest_size=16).digest())
        return self.digests[-1]

    def dataset(self) -> Dataset:
        if self.loose or not self.parts:
            self._pack()
        return concatenate_datasets(self.parts)

    def _pack(self) -> None:
        columns = {name: [row[name] for row in self.loose] for name in FEATURES}
        features = None if self.loose else FEATURES  # int32 arrays tell their own, five times as fast
        self.parts.append(Dataset.from_dict(columns, features=features))
        self.loose = []


class _RowRenderer:
    """Rows on their way through recognition, rendering and policy, counted in `summary`."""

    def __init__(
        self, rows: Rows, tokenizer: Any, data: DataSection, max_length: int, where: str, prefix: str = ""
    ) -> None:
        self.rows, self.tokenizer, self.data, self.max_length = rows, tokenizer, data, max_length
        self.where, self.prefix = where, prefix
        self.format = recognise(islice(located(rows, prefix), LOOKED_AT), data, where)
        streaming = isinstance(rows, IterableDataset)
        self.summary = DataSummary(
            source=where, format=self.format.name, reason=self.format.reason, streaming=streaming
        )

    def outcomes(self, batch: int = BATCH, ahead: int = AHEAD) -> Iterator[tuple[Example, Rendered] | None]:
        """For each row in turn what is learned of it, or None where it is dropped."""
        examples = (self.format.example(row, origin) for origin, row in located(self.rows, self.prefix))
        fitting = render_examples(examples, self.tokenizer, self.data, self.max_length, self.summary, batch, ahead)
        for outcome in fitting:
            self.summary.rows += 1
            yield outcome

    def split(self, heldout_rows: int) -> tuple[Prepared, set[bytes]]:
        """All rows, some of them held out, with the digests of those to train on."""
        count = len(self.rows)
        chosen = set(random.Random(HELDOUT_SEED).sample(range(count), min(heldout_rows, count // HELDOUT_SHARE)))
        train, heldout, seen = _Pile(), _Pile(), set[bytes]()
        examples: list[Example] = []
        preview: list[Rendered] = []
        origins: list[str] = []
        for index, outcome in enumerate(_with_progress(self.outcomes(), count)):
            if outcome is None:
                continue
            example, rendered = outcome
            if index in chosen:
                heldout.add(rendered)
                examples.append(example)
                continue
            digest = train.add(rendered)
            if digest in seen:
                self.summary.repeated.add(example.origin)
            seen.add(digest)
            self._count(rendered)
            if len(preview) < PREVIEWED:
                preview.append(rendered)
                origins.append(example.origin)
        self._check_any()
        self.summary.heldout = len(examples)
        self.summary.heldout_repeated = sum(digest in seen for digest in heldout.digests)
        set_aside = heldout.dataset() if examples else None
        return Prepared(train.dataset(), set_aside, examples, self.summary, preview, origins), seen

    def stream(self, heldout_rows: int) -> tuple[Prepared, set[bytes]]:
        """A stream that renders as it is read, after its first rows are held out. The summary counts its last pass."""
        heldout, examples = _Pile(), []
        kept = (outcome for outcome in self.outcomes(STREAM_BATCH, ahead=0) if outcome is not None)
        for example, rendered in islice(kept, heldout_rows):
            heldout.add(rendered)
            examples.append(example)
        used = self.summary.rows

        def learned() -> Iterator[tuple[Example, Rendered]]:
            self.summary.restart()
            for outcome in islice(self.outcomes(STREAM_BATCH, ahead=0), used, None):
                if outcome is not None:
                    self._count(outcome[1])
                    yield outcome

        def columns() -> Iterator[dict[str, np.ndarray]]:
            return (_columns(rendered) for _, rendered in learned())

        shown = list(islice(learned(), PREVIEWED))
        self._check_any()
        self.summary.heldout = len(examples)
        train = IterableDataset.from_generator(columns, features=FEATURES)
        preview, origins = [rendered for _, rendered in shown], [example.origin for example, _ in shown]
        set_aside = heldout.dataset() if examples else None
        return Prepared(train, set_aside, examples, self.summary, preview, origins), set()

    def _count(self, rendered: Rendered) -> None:
        self.summary.keep(len(rendered.input_ids), sum(rendered.mask[1:]))

    def _check_any(self) -> None:
        if not self.summary.kept:
            raise DataError(f"{self.where}: nothing left to learn from; {self.summary.dropped_words()}")


def _hold_out(prepared: Prepared, trained: set[bytes], data: DataSection, tokenizer: Any, max_length: int) -> None:
    """Put the rows of `data.heldout` into `prepared`."""
    assert data.heldout is not None
    source, _, split = data.heldout.partition("#")
    changes = {"source": source, "split": split or "train", "limit": None, "streaming": False}
    section = data.model_copy(update=changes)
    rows = _RowRenderer(read_rows(source, section), tokenizer, section, max_length, source, prefix="held-out")
    pile = _Pile()
    for outcome in rows.outcomes():
        if outcome is not None:
            prepared.heldout_examples.append(outcome[0])
            pile.add(outcome[1])
    summary = prepared.summary
    summary.heldout, summary.heldout_source = len(pile.digests), data.heldout
    summary.heldout_dropped = rows.summary.dropped
    summary.heldout_repeated = sum(digest in trained for digest in pile.digests)
    if not pile.digests:
        raise DataError(f"data.heldout {source}: nothing left to measure on; {rows.summary.dropped_words()}")
    prepared.heldout = pile.dataset()


def _columns(rendered: Rendered) -> dict[str, np.ndarray]:
    ids_T = np.asarray(rendered.input_ids, dtype=np.int32)
    return {"input_ids": ids_T, "labels": np.where(rendered.mask, ids_T, np.int32(IGNORE_INDEX))}


def _with_progress(outcomes: Iterator[Any], count: int) -> Iterator[Any]:
    console = Console(stderr=True)
    quiet = count < LONG_WORK or not console.is_terminal
    yield from track(outcomes, "rendering rows", total=count, console=console, transient=True, disable=quiet)
