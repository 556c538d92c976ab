"""One row as training would see it, without reading the rest of its data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parley.config import DataSection
from parley.data.bad_rows import BadRows
from parley.data.doctor.row_reader import PreferenceReader, RowKind, row_reader
from parley.data.example import Example
from parley.data.files import ERROR, Row
from parley.data.filtering import render_examples, render_options
from parley.data.recognition import RECOGNITION_ROWS, Recognised
from parley.data.render import Rendered, pin_date, pin_settings, render_many
from parley.data.sources import is_plain_split, located, read_rows
from parley.data.summary import DataSummary
from parley.errors import DataError


@dataclass(frozen=True)
class InspectedRow:
    """format: how the data set was recognised. rendered: what there is to render, by name: "" for a conversation,
    "chosen" and "rejected" for a pair. lines: what a dry run reports of this row, such as why it is dropped.
    """

    format: str
    origin: str
    rendered: dict[str, Rendered]
    lines: list[str]


def inspect_row(
    data: DataSection, tokenizer: Any, max_length: int, number: int, kind: RowKind | None = None
) -> InspectedRow:
    """Row `number`, from 1, of `data.source`. Reads no further than that row and those that decide the format.

    kind: what the training method learns from; None: what the rows' columns show.
    Raises as `prepare` does, for this row alone: one that is bad is an error whatever `data.bad_rows` says.
    """
    pin_date(tokenizer, data.date)
    pin_settings(tokenizer, data.template)
    rows = _first_rows(data, max(number, RECOGNITION_ROWS))
    if len(rows) < number:
        raise DataError(f"{data.source}: got --row {number}; it has {len(rows)} rows, and the first is 1")
    reader = row_reader(rows, data, kind)
    origin, row = rows[number - 1]
    if isinstance(reader, PreferenceReader):
        return _inspect_preference(reader, row, origin, tokenizer, data, max_length)
    format = reader.format
    example = _example(origin, row, format)
    summary = DataSummary(source=data.source)
    errors = BadRows(data.model_copy(update={"bad_rows": "error"}), advise=False)
    (outcome,) = render_examples([example], tokenizer, data, max_length, summary, ahead=0, bad_rows=errors)
    summary.unread = format.unread_with(tokenizer.chat_template)
    rendered = outcome[1] if outcome is not None else _dropped(example, tokenizer, data)
    return InspectedRow(format.reason, origin, {} if rendered is None else {"": rendered}, summary.row_lines())


def _inspect_preference(
    reader: PreferenceReader, row: Row, origin: str, tokenizer: Any, data: DataSection, max_length: int
) -> InspectedRow:
    examples = reader.read(row, origin).examples
    rendered: dict[str, Rendered] = {}
    lines: list[str] = []
    names = ("chosen", "rejected") if len(examples) == 2 else ("",)
    outcomes = render_many(tokenizer, examples, render_options(data))
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, DataError):
            raise DataError(f"{origin}: {outcome}")
        rendered[name] = outcome
        if len(outcome.input_ids) > max_length:
            lines.append(f"{name or 'the answer'} is longer than {max_length:,} tokens: data.overlong={data.overlong}")
        lines += outcome.notes
    return InspectedRow(reader.reason, origin, rendered, list(dict.fromkeys(lines)))


def _first_rows(data: DataSection, count: int) -> list[tuple[str, Row]]:
    """As a stream where the split is one, since a data set that has to be converted is read whole otherwise."""
    limit = min(count, data.limit or count)
    section = data.model_copy(update={"limit": limit, "streaming": is_plain_split(data.split)})
    return list(located(read_rows(data.source, section, keep_bad=True)))


def _example(origin: str, row: Row, format: Recognised) -> Example:
    if ERROR in row:
        raise DataError(row[ERROR])
    return format.example(row, origin)


def _dropped(example: Example, tokenizer: Any, data: DataSection) -> Rendered | None:
    """A row that training leaves out, as it would be rendered; None for one without an answer to render."""
    turns = example.completion if isinstance(example.completion, list) else example.messages
    if example.input_ids is not None or turns == []:
        return None
    (rendered,) = render_many(tokenizer, [example], render_options(data))
    return rendered if isinstance(rendered, Rendered) else None
