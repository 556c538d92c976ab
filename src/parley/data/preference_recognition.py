"""Which format of preferences a data set is in, and its rows read in that format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from parley.config import DataSection
from parley.data.columns import listed
from parley.data.files import ERROR, Row, readable_rows
from parley.data.preference_formats import PREFERENCE_FORMATS, Preference, PreferenceFormat
from parley.data.recognition import TEMPLATE_COLUMN, row_settings
from parley.errors import DataError, UsageError


def recognise_preferences(row: Row, origin: str, data: DataSection) -> PreferenceFormat | None:
    """The format of a row; None where it is no preference row."""
    return next((format for format in PREFERENCE_FORMATS if format.suits(row, format.fields(row, origin, data))), None)


def preference_format(
    rows: Iterable[tuple[str, Row]], data: DataSection, where: str, *, labelled: bool
) -> tuple[PreferenceFormat, str]:
    """The format of the first readable row, and what it was recognised by.

    labelled: for a method that learns from answers labelled one by one (KTO), which reads a pair as two of them.
    Raises DataError for rows that are no preferences, or not of the kind that the method wants.
    """
    for origin, row in readable_rows(rows, 1):
        format = recognise_preferences(row, origin, data)
        if format is None:
            raise not_preferences(row, origin)
        if format.labelled and not labelled:
            raise DataError(
                f"{origin}: is {format.label}, and this method wants pairs of a chosen and a rejected answer; set "
                "training.method: kto"
            )
        own = {*format.fields(row, origin, data).own.values()}
        columns = [column for column in row if column in own]
        kto = ", each pair as two labelled answers" if labelled and not format.labelled else ""
        return format, f"{format.label} (columns {', '.join(columns)}){kto}"
    raise DataError(f"{where}: is empty; wanted at least one row")


def preference_of(row: Row, origin: str, format: PreferenceFormat, data: DataSection) -> Preference:
    """Raises DataError for a row that cannot be read, or is of another format."""
    if ERROR in row:
        raise DataError(row[ERROR])
    fields = format.fields(row, origin, data)
    if not format.suits(row, fields):
        raise DataError(f"{origin}: is not {format.label}, as the first row is; keep one format in a data set")
    for column in ("image", "images", "audio", "video"):
        if row.get(column):
            raise DataError(f"{origin}: has {column!r}; Parley trains on text alone: remove the column, or the row")
    preference = format.preference(fields)
    template = row_settings(row)
    if not template:
        return preference
    rejected = preference.rejected and replace(preference.rejected, template=template)
    return replace(preference, chosen=replace(preference.chosen, template=template), rejected=rejected)


def unread_columns(row: Row, origin: str, format: PreferenceFormat, data: DataSection) -> list[str]:
    """Columns of a row that hold something and that its format does not read."""
    read = {name.partition(".")[0] for name in format.fields(row, origin, data).own.values()} | {TEMPLATE_COLUMN}
    return [name for name, value in row.items() if name not in read and value not in (None, "", [], {})]


def check_preference_settings(data: DataSection) -> None:
    """Raises UsageError for settings of supervised data that preferences do not follow."""
    for name, unsupported, instead in (
        ("data.format", data.format != "auto", "preferences are recognised by their columns: leave it out"),
        ("data.streaming", data.streaming, "both answers of a pair are rendered before training: set it to false"),
        (
            "data.overlong",
            data.overlong in ("split", "keep-whole-turns"),
            "set drop, error, truncate or truncate-start",
        ),
        ("data.train_on", data.train_on in ("inputs", "nothing"), "a preference is about answers: set all or last"),
    ):
        if unsupported:
            raise UsageError(f"{name} is not followed with preferences; {instead}")


def not_preferences(row: Row, origin: str) -> DataError:
    """The error for a row that is of no preference format."""
    return DataError(
        f"{origin}: got columns {listed(row)}; wanted preferences: chosen, rejected (prompt) / instruction, chosen, "
        "rejected / conversations, chosen, rejected / prompt, completion, label; name yours in data.columns, or set "
        "training.method: sft"
    )
