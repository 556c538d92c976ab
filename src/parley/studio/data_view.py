"""What the data page shows: functions for the worker process, over those of `parley inspect`.

They take a run's settings as YAML text, and cut long texts: a row may hold a megabyte in one line.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from parley.config import DataSection, ModelSection, RunConfig
from parley.data.doctor.findings import Diagnosis
from parley.data.files import ERROR, Row
from parley.data.formats import FORMATS
from parley.errors import DataError, ParleyError
from parley.safe_yaml import load_yaml
from parley.text import shorten_middle

if TYPE_CHECKING:
    from parley.data.doctor.conversation import Turn
    from parley.data.doctor.row_reader import RowReader
    from parley.serving.token_text import TokenTexts

LONGEST_TEXT = 4_000  # characters of a turn that are shown
LONGEST_SAMPLE = 80
MOST_TOKENS = 4_000  # of a row that are shown
MOST_TURNS = 50
MOST_OF_BATCH = 64  # rows of a batch that are shown

Kind = Literal["plain", "supervised", "control"]


@dataclass(frozen=True)
class Column:
    """A column of the data set, with the value of the first row that has one."""

    name: str
    sample: str


@dataclass(frozen=True)
class FormatChoice:
    """A format, and the columns that can be mapped to its own by hand."""

    name: str
    label: str
    required: list[str]
    optional: list[str]


OF_PREFERENCES = (
    FormatChoice("pairs", "pairs", ["chosen", "rejected"], ["prompt"]),
    FormatChoice("labelled", "labelled answers", ["prompt", "completion", "label"], []),
)
"""Formats that data.format has no value for: preferences are recognised by their columns."""


@dataclass(frozen=True)
class Look:
    """The first rows of a data set. `format`: what it was recognised as; `problem`: why it was not."""

    columns: list[Column]
    formats: list[FormatChoice]
    format: str = ""
    problem: str = ""


@dataclass(frozen=True)
class ShownTurn:
    role: str
    text: str
    more: int = 0  # characters that are not shown


@dataclass(frozen=True)
class ShownRow:
    """Row `number`, from 1. `sides`: its dialogues, one, or chosen and rejected; `problem`: why it has none."""

    number: int
    origin: str
    sides: list[list[ShownTurn]] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class RowsPage:
    """`following`: whether there are more rows of this search after these."""

    rows: list[ShownRow]
    following: bool


@dataclass(frozen=True)
class TokenView:
    """`sides`: by name, tokens as text and kind; `lines`: what training says of the row."""

    sides: dict[str, list[tuple[str, Kind]]]
    lines: list[str]
    counts: dict[str, tuple[int, int]]  # tokens, and supervised ones
    cut: bool


def look(text: str) -> Look:
    """Raises DataError where nothing can be read."""
    from parley.data.sources import located, read_rows

    config = _config(text)
    first = list(islice(located(read_rows(config.data.source, config.data, keep_bad=True)), 20))
    samples: dict[str, str] = {}
    for _, row in first:
        for name, value in row.items():
            if name != ERROR and not samples.get(name):
                samples[name] = shorten_middle(_as_text(value), LONGEST_SAMPLE)
    columns = [Column(name, sample) for name, sample in samples.items()]
    try:
        return Look(columns, _formats(), _reader(config.data, first).reason)
    except ParleyError as error:
        return Look(columns, _formats(), problem=str(error))


def check(text: str) -> Diagnosis:
    """The doctor's findings, lengths in tokens of the run's model included. Raises DataError and ModelError."""
    from parley.data.doctor.diagnose import diagnose

    config = _config(text)
    return diagnose(config.data, _tokenizer(config.model), config.model.max_seq_length, for_training=True)


def rows(text: str, start: int, count: int, search: str, found_by: str) -> RowsPage:
    """Rows from `start` on, from 0, of those that hold `search` and that the check `found_by` found.

    Raises DataError.
    """
    from parley.data.doctor.diagnose import rows_to_drop
    from parley.data.sources import located, read_rows

    data = _config(text).data
    flagged = None
    if found_by:
        flagged = rows_to_drop(data.model_copy(update={"drop": [found_by]}), None).keys()
    reader = _reader(data, islice(located(read_rows(data.source, data, keep_bad=True)), 20))
    matching = _matching(located(read_rows(data.source, data, keep_bad=True)), search.casefold(), flagged)
    taken = list(islice(matching, start, start + count + 1))
    return RowsPage([_shown(number, origin, row, reader) for number, origin, row in taken[:count]], len(taken) > count)


def rows_at(text: str, origins: list[str]) -> list[ShownRow]:
    """The rows of a run's data by their origins, in the order of the data; as many as there still are.

    Raises DataError.
    """
    from parley.data.sources import located, read_rows

    data = _config(text).data
    reader = _reader(data, islice(located(read_rows(data.source, data, keep_bad=True)), 20))
    wanted, found = set(origins[:MOST_OF_BATCH]), []
    for number, (origin, row) in enumerate(located(read_rows(data.source, data, keep_bad=True)), 1):
        if origin in wanted:
            wanted.remove(origin)
            found.append(_shown(number, origin, row, reader))
        if not wanted:
            break
    return found


def tokens(text: str, number: int) -> TokenView:
    """Row `number`, from 1, as the model sees it. Raises DataError and ModelError."""
    from parley.data.control_tokens import control_tokens
    from parley.data.inspection import inspect_row
    from parley.serving.token_text import TokenTexts

    config = _config(text)
    tokenizer = _tokenizer(config.model)
    inspected = inspect_row(config.data, tokenizer, config.model.max_seq_length, number)
    special, texts = control_tokens(tokenizer).ids, TokenTexts(tokenizer)
    sides, counts, cut = {}, {}, False
    for name, rendered in inspected.rendered.items():
        ids, mask = rendered.input_ids, rendered.mask
        kinds: list[Kind] = [
            "supervised" if on else "control" if token in special else "plain"
            for token, on in zip(ids, mask, strict=True)
        ]
        counts[name], cut = (len(ids), sum(map(bool, mask))), cut or len(ids) > MOST_TOKENS
        sides[name] = list(zip(_token_texts(texts, ids[:MOST_TOKENS]), kinds, strict=False))
    return TokenView(sides, inspected.lines, counts, cut)


def _config(text: str) -> RunConfig:
    return RunConfig.create(load_yaml(text, "settings") or {})


@lru_cache(maxsize=1)
def _cached_tokenizer(section: str) -> Any:
    from parley.models.tokenizer import load_tokenizer

    return load_tokenizer(ModelSection.model_validate_json(section))


def _tokenizer(section: ModelSection) -> Any:
    """Kept from call to call: a large vocabulary takes a second to load."""
    return _cached_tokenizer(section.model_dump_json())


def _reader(data: DataSection, first: Iterator[tuple[str, Row]] | list[tuple[str, Row]]) -> RowReader:
    from parley.data.doctor.row_reader import row_reader

    return row_reader(first, data)


def _matching(
    rows: Iterator[tuple[str, Row]], search: str, flagged: Collection[int] | None
) -> Iterator[tuple[int, str, Row]]:
    for index, (origin, row) in enumerate(rows):
        if (flagged is None or index in flagged) and (not search or search in _as_text(row).casefold()):
            yield index + 1, origin, row


def _shown(number: int, origin: str, row: Row, reader: RowReader) -> ShownRow:
    if ERROR in row:
        return ShownRow(number, origin, problem=str(row[ERROR]))
    try:
        dialogues = reader.read(row, origin).dialogues
    except DataError as error:
        return ShownRow(number, origin, problem=str(error))
    sides = [[_shown_turn(turn) for turn in dialogue.turns[:MOST_TURNS]] for dialogue in dialogues]
    return ShownRow(number, origin, sides)


def _shown_turn(turn: Turn) -> ShownTurn:
    whole = "\n".join((*turn.other, turn.content)) if turn.other else turn.content
    return ShownTurn(turn.role, whole[:LONGEST_TEXT], max(0, len(whole) - LONGEST_TEXT))


def _formats() -> list[FormatChoice]:
    supervised = [
        FormatChoice(each.name, each.label, [names[0] for names in each.columns], [n[0] for n in each.optional])
        for each in FORMATS
    ]
    return [*supervised, *OF_PREFERENCES]


def _token_texts(texts: TokenTexts, ids: list[int]) -> list[str]:
    """The text of each token; of a character that several tokens share, the first has it."""
    shown = []
    pending, start = b"", 0
    for index, token in enumerate(ids):
        if not pending:
            start = index
        pending += texts.bytes_of(token)
        shown.append("")
        try:
            shown[start] = pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and index + 1 < len(ids):
                continue
            shown[start] = pending.decode(errors="replace")
        pending = b""
    return shown


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
