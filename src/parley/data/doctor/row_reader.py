"""How the doctor reads a row: as one conversation, or as a preference between answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from parley.config import DataSection
from parley.data.columns import TURN_KEYS
from parley.data.doctor.conversation import Conversation, conversation_of
from parley.data.doctor.empty_answers import empty_answer
from parley.data.example import Example
from parley.data.files import Row, readable_rows
from parley.data.preference_formats import PreferenceFormat
from parley.data.preference_recognition import (
    check_preference_settings,
    preference_format,
    preference_of,
    recognise_preferences,
)
from parley.data.recognition import RECOGNITION_ROWS, Recognised, recognise

RowKind: TypeAlias = Literal["supervised", "pairs", "labelled"]
"""What a training method learns from: conversations, pairs of answers, or answers labelled one by one."""


@dataclass(frozen=True)
class CheckedRow:
    """What is checked of a row. examples: one, or chosen and rejected answer with their prompt, in that order.

    text: all it says, once. dialogues: the turns of each example. empty: where an answer has no text.
    """

    examples: list[Example]
    text: Conversation
    dialogues: list[Conversation]
    empty: str | None = None


class SupervisedReader:
    """Rows of supervised fine-tuning, each one conversation."""

    def __init__(self, format: Recognised) -> None:
        self.format, self.reason = format, format.reason
        self.kind: RowKind = "supervised"

    def read(self, row: Row, origin: str) -> CheckedRow:
        """Raises DataError naming the row."""
        return self.checked(row, self.format.example(row, origin))

    def checked(self, row: Row, example: Example) -> CheckedRow:
        """`row`, which is read already, with its example. Raises DataError as `read` does."""
        conversation = conversation_of(example)
        empty = (
            None if example.input_ids is not None else empty_answer(row, example, self.format.format, self.format.data)
        )
        return CheckedRow([example], conversation, [conversation], empty)


class PreferenceReader:
    """Rows of preferences: pairs of answers to one prompt, or labelled answers."""

    def __init__(self, format: PreferenceFormat, reason: str, data: DataSection, kind: RowKind) -> None:
        self.format, self.reason, self.data = format, reason, data
        self.kind: RowKind = kind

    def read(self, row: Row, origin: str) -> CheckedRow:
        """Raises DataError naming the row."""
        preference = preference_of(row, origin, self.format, self.data)
        examples = [preference.chosen, *([preference.rejected] if preference.rejected is not None else [])]
        dialogues = [conversation_of(example) for example in examples]
        text = dialogues[0]
        if preference.rejected is not None:
            rejected = preference.rejected.completion
            answer = 1 if isinstance(rejected, str) else len(rejected or [])
            text = replace(text, turns=(*text.turns, *dialogues[1].turns[-answer:]))
        return CheckedRow(examples, text, dialogues)


RowReader: TypeAlias = SupervisedReader | PreferenceReader


def row_reader(rows: Iterable[tuple[str, Row]], data: DataSection, kind: RowKind | None = None) -> RowReader:
    """The reader of a source's rows, each with its origin, for a method that learns from `kind`.

    kind: None for what the columns show.

    Raises DataError and UsageError for rows that the method cannot be trained on, as preparing them does.
    """
    first = readable_rows(rows, RECOGNITION_ROWS)
    kind = kind or _kind_of(first, data)
    if kind == "supervised":
        return SupervisedReader(recognise(first, data, data.source))
    check_preference_settings(data)
    format, reason = preference_format(first, data, data.source, labelled=kind == "labelled")
    return PreferenceReader(format, reason, data, kind)


def _kind_of(first: list[tuple[str, Row]], data: DataSection) -> RowKind:
    if not first or data.format != "auto":
        return "supervised"
    origin, row = first[0]
    format = recognise_preferences(row, origin, data)
    if format is None:
        return "supervised"
    spellings = {name for names in (*format.columns, *format.optional) for name in names}
    if not data.columns.keys() - set(TURN_KEYS) <= spellings:
        return "supervised"  # such as {completion: chosen}: one of the answers is imitated
    if format.labelled:
        # A label that is no boolean may be the class of a classification data set.
        return "labelled" if isinstance(format.fields(row, origin, data).value("label"), bool) else "supervised"
    return "pairs"
