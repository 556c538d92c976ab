"""One row as training would see it, without reading the rest of its data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parley.config import DataSection
from parley.data.bad_rows import BadRows
from parley.data.example import Example
from parley.data.files import ERROR, Row
from parley.data.filtering import render_examples, render_options
from parley.data.recognition import RECOGNITION_ROWS, Recognised, recognise
from parley.data.render import Rendered, pin_date, pin_settings, render_many
from parley.data.sources import is_plain_split, located, read_rows
from parley.data.summary import DataSummary
from parley.errors import DataError


@dataclass(frozen=True)
class InspectedRow:
    """format: how the data set was recognised. rendered: None where there is nothing to render. lines: what a dry run
    reports of this row, such as why it is dropped.
    """

    format: str
    origin: str
    rendered: Rendered | None
    lines: list[str]


def inspect_row(data: DataSection, tokenizer: Any, max_length: int, number: int) -> InspectedRow:
    """Row `number`, from 1, of `data.source`. Reads no further than that row and those that decide the format.

    Raises as `prepare` does, for this row alone: one that is bad is an error whatever `data.bad_rows` says.
    """
    pin_date(tokenizer, data.date)
    pin_settings(tokenizer, data.template)
    rows = _first_rows(data, max(number, RECOGNITION_ROWS))
    if len(rows) < number:
        raise DataError(f"{data.source}: got --row {number}; it has {len(rows)} rows, and the first is 1")
    readable = [(origin, row) for origin, row in rows if ERROR not in row]
    format = recognise(readable[:RECOGNITION_ROWS], data, data.source)
    example = _example(*rows[number - 1], format)
    summary = DataSummary(source=data.source)
    errors = BadRows(data.model_copy(update={"bad_rows": "error"}), advise=False)
    (outcome,) = render_examples([example], tokenizer, data, max_length, summary, ahead=0, bad_rows=errors)
    summary.unread = list(format.unread)
    rendered = outcome[1] if outcome is not None else _dropped(example, tokenizer, data)
    return InspectedRow(format.reason, example.origin, rendered, summary.row_lines())


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
