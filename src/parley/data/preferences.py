"""Preference rows to what a preference trainer takes: both answers rendered, with the masks of supervised rows.

T: tokens of an answer with its prompt.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

from parley.config import DataSection
from parley.data.bad_rows import BadRow, BadRows
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.doctor.diagnose import rows_to_drop
from parley.data.example import Example
from parley.data.filtering import BATCH, NOTHING_SUPERVISED, SHORTENED, render_options
from parley.data.heldout_split import heldout_section, is_heldout, sampled_rows
from parley.data.packing import ORIGIN
from parley.data.preference_formats import Preference
from parley.data.preference_recognition import (
    check_preference_settings,
    preference_format,
    preference_of,
    unread_columns,
)
from parley.data.prepare import PREVIEWED, Prepared
from parley.data.render import Rendered, pin_date, pin_settings, render_many
from parley.data.sources import Rows, located, read_rows
from parley.data.summary import DataSummary, RowGroup
from parley.errors import DataError, UsageError

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "labelled"]
"""What a loss learns from: pairs of answers, or answers that are labelled one by one."""

BIAS_PAIRS = 20
"""Pairs from which on a length bias is looked for."""
LENGTH_BIAS = 0.8
"""Share of pairs with the longer answer chosen (or the shorter one) from which on length alone would be learned."""
SWAPPED = "swapped pairs: an earlier row prefers the other answer to the same prompt"

_IDS = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
FEATURES: dict[Kind, Features] = {
    "pairs": Features(
        {f"{side}_{name}": value for side in ("chosen", "rejected") for name, value in _IDS.items()}
        | {ORIGIN: Value("string")}
    ),
    "labelled": Features(_IDS | {"desirable": Value("bool"), ORIGIN: Value("string")}),
}


def prepare_preferences(data: DataSection, tokenizer: Any, max_length: int, kind: Kind) -> Prepared:
    """`parley.data.prepare.prepare` for preferences. `train` and `heldout` have the columns of FEATURES.

    Raises DataError and UsageError in one line, as `prepare` does.
    """
    check_preference_settings(data)
    pin_date(tokenizer, data.date)
    pin_settings(tokenizer, data.template)
    left_out = rows_to_drop(data, kind) if data.drop else {}
    rows = read_rows(data.source, data, keep_bad=True)
    assert not isinstance(rows, IterableDataset), "streams are refused"
    renderer = PreferenceRenderer(rows, tokenizer, data, max_length, kind, data.source, left_out=left_out)
    share = data.heldout_share
    sampled = sampled_rows(0 if data.heldout else data.heldout_rows, len(rows))
    train, heldout = _Columns(kind), _Columns(kind)
    for index, preference, rendered in renderer.rendered():
        held = index in sampled if share is None else is_heldout(preference.chosen, share)
        (heldout if held else train).add(preference, rendered)
        if not held:
            renderer.count(rendered)
    prepared = Prepared(
        train.dataset(), heldout.dataset(), heldout.examples, renderer.summary, renderer.bad_rows,
        train.preview, train.preview_origins,
    )  # fmt: skip
    renderer.check_any()
    if data.heldout and share is None:
        section = heldout_section(data)
        held_rows = read_rows(section.source, section, keep_bad=True)
        assert not isinstance(held_rows, IterableDataset), "held-out rows are read whole"
        other = PreferenceRenderer(held_rows, tokenizer, section, max_length, kind, section.source, "held-out")
        for _, preference, rendered in other.rendered():
            heldout.add(preference, rendered)
        prepared.heldout, prepared.heldout_examples = heldout.dataset(), heldout.examples
        prepared.summary.heldout_dropped = dict(other.summary.dropped)
    prepared.summary.heldout = len(heldout.examples)
    prepared.summary.heldout_source = data.heldout
    if not heldout.examples:
        if data.heldout:
            raise DataError(f"data.heldout {data.heldout}: nothing left to evaluate on")
        prepared.heldout = None
    return prepared


def render_preferences(
    rows: Rows, tokenizer: Any, data: DataSection, max_length: int, *, kind: Kind, where: str
) -> tuple[Dataset, DataSummary]:
    """`rows` in memory with the columns of FEATURES, and their summary. `where` names them in messages."""
    check_preference_settings(data)
    if data.drop:
        raise UsageError("data.drop is not followed with rows in memory; leave it out")
    renderer = PreferenceRenderer(rows, tokenizer, data, max_length, kind, where, where)
    columns = _Columns(kind)
    for _, preference, rendered in renderer.rendered():
        columns.add(preference, rendered)
        renderer.count(rendered)
    renderer.check_any()
    return columns.dataset(), renderer.summary


def render_preference_stream(
    rows: IterableDataset, tokenizer: Any, data: DataSection, max_length: int, *, kind: Kind, where: str
) -> IterableDataset:
    """`rows` with the columns of FEATURES, rendered as they come; what is dropped is logged with its batch."""
    check_preference_settings(data)
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{where}: is empty; wanted at least one row")

    def render(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names, position = list(batch), indices[0]
        part = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        prefix = f"{where} (after {position:,})" if position else where  # rows are counted from the batch's first
        renderer = PreferenceRenderer(Dataset.from_list(part), tokenizer, data, max_length, kind, where, prefix)
        columns = _Columns(kind)
        for _, preference, rendered in renderer.rendered():
            columns.add(preference, rendered)
        if renderer.summary.dropped:
            logger.warning(
                "%s, rows %d to %d: %s", where, position + 1, position + len(part), renderer.summary.dropped_line()
            )
        return {name: [row[name] for row in columns.rows] for name in FEATURES[kind]}

    return rows.map(
        render, with_indices=True, batched=True, batch_size=BATCH, remove_columns=list(first), features=FEATURES[kind]
    )


class PreferenceRenderer:
    """Recognises and renders preference rows, and counts them in `summary`. `prefix` names rows without a file.

    left_out: the checks of `data.drop` by the numbers, from 0, of the rows they found.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Any,
        data: DataSection,
        max_length: int,
        kind: Kind,
        where: str,
        prefix: str = "",
        left_out: Mapping[int, str] | None = None,
    ) -> None:
        self.rows, self.tokenizer, self.data, self.max_length = rows, tokenizer, data, max_length
        self.kind, self.where, self.prefix, self.left_out = kind, where, prefix, left_out or {}
        self.bad_rows = BadRows(data, advise=not prefix)
        self.format, reason = preference_format(located(rows, prefix), data, where, labelled=kind == "labelled")
        self.summary = DataSummary(source=where, format=self.format.label, reason=reason)
        self._longer, self._shorter = RowGroup(), RowGroup()  # pairs by the length of their chosen answer
        self._seen: set[tuple[bytes, bytes]] = set()  # digests of the answers of each pair, with their prompt

    def rendered(self) -> Iterator[tuple[int, Preference, list[Rendered]]]:
        """Number, preference and renderings of each row that is kept; a pair has two renderings, chosen first."""
        preferences = self._preferences()
        while batch := list(islice(preferences, BATCH)):
            good = [entry for _, entry in batch if isinstance(entry, Preference)]
            examples = [example for entry in good for example in _examples(entry)]
            outcomes = iter(render_many(self.tokenizer, examples, render_options(self.data)))
            for index, entry in batch:
                self.bad_rows.rows += 1
                self.summary.rows += 1
                try:
                    if isinstance(entry, BadRow):
                        raise entry.error
                    rendered = [next(outcomes) for _ in _examples(entry)]
                    kept = self._fitting(entry, rendered)
                    if kept is not None:
                        yield index, entry, kept
                except DataError as error:
                    self.bad_rows.handle(entry if isinstance(entry, BadRow) else BadRow(entry.origin, error))
                    self.summary.skip(entry.origin, str(error))

    def count(self, rendered: list[Rendered]) -> None:
        """Count a row to train on."""
        self.summary.keep(sum(len(part.input_ids) for part in rendered), sum(sum(part.mask[1:]) for part in rendered))

    def check_any(self) -> None:
        """Note a length bias. Raises DataError where nothing is left to train on, or too many rows are bad."""
        pairs = self._longer.count + self._shorter.count
        for how, group in (("longer", self._longer), ("shorter", self._shorter)):
            if pairs >= BIAS_PAIRS and group.count >= LENGTH_BIAS * pairs:
                self.summary.notes[f"length bias: pairs whose chosen answer is the {how} one"] = group
        if not self.summary.kept:
            raise DataError(f"{self.where}: nothing left to train on; {self.summary.nothing_left()}")
        self.bad_rows.check()

    def _preferences(self) -> Iterator[tuple[int, Preference | BadRow]]:
        for index, (origin, row) in enumerate(located(self.rows, self.prefix)):
            try:
                preference = preference_of(row, origin, self.format, self.data)
                if not self.summary.unread:
                    self.summary.unread = unread_columns(row, origin, self.format, self.data)
            except DataError as error:
                yield index, BadRow(origin, error, row)
                continue
            if index in self.left_out:
                self.summary.rows += 1
                self.summary.drop(f"by data.drop={self.left_out[index]}", origin)
                continue
            if self.kind == "labelled" and preference.rejected is not None:  # as TRL's unpair_preference_dataset
                yield index, replace(preference, rejected=None, desirable=True)
                yield index, Preference(origin, preference.rejected, desirable=False)
            else:
                yield index, preference

    def _fitting(self, preference: Preference, outcomes: list[Rendered | DataError]) -> list[Rendered] | None:
        """Both renderings, cut as data.overlong says; None where the row is dropped. Raises DataError for a bad row."""
        rendered: list[Rendered] = []
        for outcome in outcomes:
            if isinstance(outcome, DataError):
                raise DataError(f"{preference.origin}: {outcome}")
            if outcome.weights is not None:
                raise DataError(
                    f"{preference.origin}: has loss weights between 0 and 1, which preference losses do not follow; "
                    "remove them, or leave the row out"
                )
            rendered.append(outcome)
        longest = max(len(part.input_ids) for part in rendered)
        if longest > self.max_length:
            match self.data.overlong:
                case "drop":
                    self.summary.drop(f"longer than {self.max_length:,} tokens", preference.origin)
                    return None
                case "error":
                    raise DataError(
                        f"{preference.origin}: {longest:,} tokens, the longest allowed is {self.max_length:,}; raise "
                        "model.max_seq_length, or set data.overlong to drop, truncate or truncate-start"
                    )
                case policy:
                    self.summary.shorten(SHORTENED[policy].format(f"{self.max_length:,}"), preference.origin)
            rendered = [self._cut(part) for part in rendered]
        if not all(any(part.mask[1:]) for part in rendered):
            self.summary.drop(NOTHING_SUPERVISED, preference.origin)
            return None
        for part in rendered:
            for note in part.notes:
                self.summary.note(note, preference.origin)
        if len(rendered) == 2:
            self._compare(preference.origin, *rendered)
        return rendered

    def _compare(self, origin: str, chosen: Rendered, rejected: Rendered) -> None:
        """Count what the answers of a pair say of the data set."""
        lengths = [len(part.input_ids) for part in (chosen, rejected)]
        if lengths[0] != lengths[1]:
            (self._longer if lengths[0] > lengths[1] else self._shorter).add(origin)
        # The prompt is part of both.
        first, second = (np.array(part.input_ids, dtype=np.int32).tobytes() for part in (chosen, rejected))
        pair = (hashlib.blake2b(first, digest_size=16).digest(), hashlib.blake2b(second, digest_size=16).digest())
        if pair in self._seen:
            self.summary.repeated.add(origin)
        if pair[::-1] in self._seen:
            self.summary.note(SWAPPED, origin)
        self._seen.add(pair)

    def _cut(self, rendered: Rendered) -> Rendered:
        length = len(rendered.input_ids)
        if length <= self.max_length:
            return rendered
        return rendered.part(0, self.max_length) if self.data.overlong == "truncate" else rendered.part(
            length - self.max_length, None
        )  # fmt: skip


class _Columns:
    """Rendered rows collected for a Dataset, with the first of them to show, and their examples."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.rows: list[dict[str, Any]] = []
        self.examples: list[Example] = []
        self.preview: list[Rendered] = []
        self.preview_origins: list[str] = []

    def add(self, preference: Preference, rendered: list[Rendered]) -> None:
        sides = ("chosen_", "rejected_") if self.kind == "pairs" else ("",)
        row: dict[str, Any] = {ORIGIN: preference.origin.encode(errors="replace").decode()}
        for side, part in zip(sides, rendered, strict=True):
            ids_T = np.array(part.input_ids, dtype=np.int32)
            row[f"{side}input_ids"] = ids_T
            row[f"{side}labels"] = np.where(np.array(part.mask, dtype=bool), ids_T, np.int32(IGNORE_INDEX))
        if self.kind == "labelled":
            row["desirable"] = preference.desirable
        self.rows.append(row)
        self.examples.append(_whole(preference.chosen))
        if len(self.preview) < PREVIEWED:
            self.preview += rendered
            self.preview_origins += [preference.origin] * len(rendered)

    def dataset(self) -> Dataset:
        features = FEATURES[self.kind]
        return Dataset.from_dict({name: [row[name] for row in self.rows] for name in features}, features=features)


def _examples(preference: Preference) -> list[Example]:
    return [preference.chosen, *([preference.rejected] if preference.rejected is not None else [])]


def _whole(example: Example) -> Example:
    """A prompt with its answer as one conversation, which questions for the report are taken from."""
    if not isinstance(example.prompt, list) or not isinstance(example.completion, list):
        return example
    return replace(example, messages=[*example.prompt, *example.completion], prompt=None, completion=None)
