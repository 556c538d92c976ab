"""Which format a data set is in, recognised by the columns of its first rows, and which of its columns are not read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from parley.config import DataSection
from parley.config_keys import unknown_key
from parley.data.columns import TURN_KEYS, Fields, listed, lookup
from parley.data.example import LOSS_KEYS, REASONING_KEYS, Example, Message
from parley.data.files import Row
from parley.data.formats import BY_NAME, FORMATS, Format
from parley.data.loss_weights import ROW_FLAGS
from parley.data.messages import ROLES
from parley.errors import DataError, UsageError

_KNOWN = "instruction, response (context) / conversations / messages / prompt, completion / text / input_ids"
RECOGNITION_ROWS = 20
"""Rows read to recognise a format by."""
TEMPLATE_COLUMN = "chat_template_kwargs"
"""TRL's column of settings of the chat template, of each row."""
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_READ_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "type", *REASONING_KEYS, *LOSS_KEYS}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos", "media")


@dataclass
class Recognised:
    """A data set's format. `reason` says what it was recognised by, `origin` which row.

    `unread` collects columns of rows made into examples that the format does not read, in their order; `turn_keys`
    the keys of turns that are left to the chat template, which may read them or not.
    """

    format: Format
    reason: str
    origin: str
    data: DataSection
    unread: dict[str, None] = field(default_factory=dict)
    turn_keys: dict[str, None] = field(default_factory=dict)
    _unread_of: dict[tuple[str | None, ...], list[str]] = field(default_factory=dict)  # by columns, and those read

    @property
    def name(self) -> str:
        return self.format.name

    def example(self, row: Row, origin: str) -> Example:
        """`row` as an Example.

        Turns without text are dropped, so that a row without an answer becomes an Example without one. Raises
        DataError naming the row: another format than the first row's, a field that is not text, an unknown role.
        """
        fields = _fields_of(row, origin, self.data, self.format)
        if fields is None:
            other = next((format for format in FORMATS if _suiting(format, row, origin, self.data, self.name)), None)
            seen = f"is {other.label}" if other else f"has columns {listed(row)}"
            expected = f"{self.origin} is {self.format.label}"
            raise DataError(f"{origin}: {seen}, but {expected}; keep one format in a data set")
        self._note_unread(row, fields)
        example = self.format.example(fields, self.data)
        for messages in (example.messages, example.prompt, example.completion):
            if isinstance(messages, list):
                self._note_turn_keys(messages)
        settings = row_settings(row)
        return replace(example, template=settings) if settings else example

    def _note_turn_keys(self, messages: list[Message]) -> None:
        for message in messages:
            if len(message) > 2:
                self.turn_keys |= dict.fromkeys(key for key in message if key not in _READ_KEYS)

    def unread_with(self, template: object) -> list[str]:
        """What neither Parley nor the chat template reads: columns, and keys of turns."""
        source = str(template or "")
        keys = (key for key in self.turn_keys if not re.search(rf"\b{re.escape(key)}\b", source))
        return [*self.unread, *(f"{key} of turns" for key in keys)]

    def _note_unread(self, row: Row, fields: Fields) -> None:
        _refuse_what_training_cannot_see(row, fields)
        # Once per combination of columns, since this runs for every row. None separates the two lists of names.
        key = (*row, None, *fields.own.values())
        if key not in self._unread_of:
            read = {name.partition(".")[0] for name in fields.own.values()} | {*ROW_FLAGS, TEMPLATE_COLUMN}
            self._unread_of[key] = [column for column in row if column not in read]
        for column in self._unread_of[key]:
            if row[column] not in _EMPTY:
                self.unread.setdefault(column)


def row_settings(row: Row) -> dict[str, Any]:
    """Settings of the chat template for this row alone."""
    settings = row.get(TEMPLATE_COLUMN)
    # Arrow fills what a row leaves out with None.
    return {name: value for name, value in settings.items() if value is not None} if isinstance(settings, dict) else {}


def recognise(rows: Iterable[tuple[str, Row]], data: DataSection, where: str = "the data set") -> Recognised:
    """The format of the first of `rows` (origin and row) that shows one, or the one that `data.format` names.

    Raises UsageError for `data.columns` that no format knows, DataError for columns that are missing or unknown.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{where}: is empty; wanted at least one row")
    _check_mapping(data, rows)
    undecided: Recognised | None = None
    candidates = FORMATS if data.format == "auto" else (BY_NAME[data.format],)
    for origin, row in rows:
        for format in candidates:
            fields = _suiting(format, row, origin, data, None if data.format == "auto" else data.format)
            if fields is None:
                continue
            found = Recognised(format, _reason(format, fields, data), origin, data)
            if format.shows(fields):
                return found
            # Used only if no later row shows its format, for example where all lists of turns are empty.
            undecided = undecided or found
            break
    if undecided is None:
        raise _unknown(*rows[0], data)
    return undecided


def _fields_of(row: Row, origin: str, data: DataSection, format: Format) -> Fields | None:
    """The row's fields where it is of `format`; a row with some of the format's columns, and of no other, is too."""
    fields = format.fields(row, origin, data)
    if format.suits(fields, format.name):
        return fields
    if any(_suiting(other, row, origin, data, format.name) for other in FORMATS):
        return None
    # An unanswered row lacks the answer's column. It is of this format, and is dropped later rather than refused here.
    return fields if any(names[0] in fields.own for names in format.columns) else None


def _suiting(format: Format, row: Row, origin: str, data: DataSection, expected: str | None) -> Fields | None:
    mapped = data.columns.keys() - set(TURN_KEYS)
    # data.columns names columns of the intended format, so a format without them is not the intended one.
    if format.name != expected and not mapped <= set(format.spellings()):
        return None
    fields = format.fields(row, origin, data)
    return fields if format.suits(fields, expected) else None


def _reason(format: Format, fields: Fields, data: DataSection) -> str:
    own = set(fields.own.values())
    columns = [column for column in fields.row if column in own] + [
        column for column in own if column not in fields.row
    ]
    chosen = "as data.format says, " if data.format != "auto" else ""
    return f"{format.label} ({chosen}column{'s' * (len(columns) > 1)} {', '.join(columns)}{format.note})"


def _check_mapping(data: DataSection, rows: list[tuple[str, Row]]) -> None:
    known = {*(name for format in FORMATS for name in format.spellings()), *TURN_KEYS}
    for canonical, own in data.columns.items():
        if canonical not in known:
            raise unknown_key(canonical, known, "data.columns")
        # Looked for in all of the first rows, since an optional column may be null or absent in some.
        if canonical not in TURN_KEYS and not any(lookup(row, own) is not None or own in row for _, row in rows):
            origin, row = rows[0]
            raise DataError(
                f"{origin}: data.columns maps {canonical} to {own}, which is missing; it has columns {listed(row)}"
            )
    for own, role in data.roles.items():
        if role not in ROLES:
            raise UsageError(
                f"data.roles maps {own} to {role!r}; wanted one of {', '.join(sorted(set(ROLES.values())))}"
            )


def _refuse_what_training_cannot_see(row: Row, fields: Fields) -> None:
    """Rows that mean something other than "train on this answer" are never trained on in silence."""
    for column in _MEDIA:
        if row.get(column) and column not in fields.own.values():
            raise DataError(
                f"{fields.origin}: has {column!r}; Parley trains on text alone and the model would never see it: "
                "remove the column, or the row"
            )
    # Only the literal false: in other data sets `label` is a class index.
    if row.get("label") is False:
        raise DataError(
            f"{fields.origin}: label is false, an undesired answer of an unpaired preference set (KTO), which "
            "supervised fine-tuning would learn; remove such rows, or set training.method: kto"
        )


def _likely_mapping(row: Row) -> str:
    """data.columns for columns named as others name them, empty for none. Never applied unasked: names mislead."""
    named = {column.strip().lower(): column for column, value in row.items() if isinstance(value, str)}
    question = next((named[name] for name in _QUESTIONS if name in named), None)
    answer = next((named[name] for name in _ANSWERS if name in named and named[name] != question), None)
    if question is None or answer is None:
        return ""
    own = {"instruction": question, "response": answer}
    return "{" + ", ".join(f"{name}: {column}" for name, column in own.items() if name != column) + "}"


_QUESTIONS = ("instruction", "question", "prompt", "query", "user", "human", "problem", "input")
_ANSWERS = ("response", "answer", "completion", "reply", "assistant", "solution", "target", "output")


def _unknown(origin: str, row: Row, data: DataSection) -> DataError:
    if data.format == "auto":
        if row.get("chosen") is not None and row.get("rejected") is not None:
            return DataError(
                f"{origin}: is a preference pair (columns {listed(row)}); supervised fine-tuning learns from one "
                "answer: name it, data.columns={completion: chosen}, or set training.method: dpo"
            )
        if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
            return DataError(
                f'{origin}: is a single turn; wanted a conversation a row: {{"messages": [turn, turn, ...]}}'
            )
        wanted = _KNOWN
        if mapping := _likely_mapping(row):
            return DataError(
                f"{origin}: got columns {listed(row)}; wanted {wanted}; if these are questions and answers: --set "
                f"'data.columns={mapping}'"
            )
    else:
        wanted = " and ".join(" or ".join(names) for names in BY_NAME[data.format].columns) + ", as data.format says"
    return DataError(
        f"{origin}: got columns {listed(row)}; wanted {wanted}; name yours in data.columns, "
        "for example {instruction: question, response: answer}"
    )
