"""Rows of local JSON, JSON-lines and CSV files, as they are written and with the place each one stands at.

They do not pass through Arrow, which would give every tool call the arguments of all others (as None), read dates
out of text, and name no line when something is wrong.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from parley.errors import DataError

Row = dict[str, Any]
ORIGIN = "__origin__"
"""The key under which a row of a local file says where it stands: "rows.jsonl line 12"."""

KINDS = (".json", ".jsonl", ".csv", ".parquet")


def kind_of(path: Path) -> str | None:
    """Which of KINDS a file is by its name, `.gz` set aside; None for others."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def read_files(files: list[str]) -> Iterator[Row]:
    """The rows of JSON or CSV files one after the other, each with its ORIGIN. Raises DataError naming the line."""
    for file in files:
        path = Path(file)
        empty = True
        for place, row in _READERS[kind_of(path) or ".jsonl"](path):
            empty = False
            yield {**row, ORIGIN: f"{path.name} {place}"}
        if empty:
            raise DataError(f"{path}: is empty; wanted at least one row")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, a byte-order mark set aside."""
    number = 1
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path.name} line {number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; the file looks like one JSON document: name it .json" if line.strip() in ("[", "{") else ""
            raise DataError(f"{path.name} line {number}: broken JSON ({_why(error)}){hint}") from None
        yield f"line {number}", _object(row, f"{path.name} line {number}")


def _json_document(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of objects, {"data": [...]}, or, as many files named .json are, JSON lines."""
    text = "".join(_lines(path))
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_lines(path)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name}{line}: broken JSON ({_why(error)})") from None
    if isinstance(rows, dict):
        if not isinstance(rows.get("data"), list):
            keys = ", ".join(rows) or "none"
            raise DataError(f'{path}: got an object with keys {keys}; wanted a list of rows or {{"data": [...]}}')
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f'{path}: got {type_name(rows)}; wanted a list of rows or {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _object(row, f"{path.name} row {number}")


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of strings. The separator is the one of , ; and tab that the header has most of."""
    lines = _lines(path)
    header = next(lines, "")
    separator = max(",;\t", key=header.count)
    reader = csv.reader(_chain(header, lines), delimiter=separator, strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise DataError(f"{path.name}: two columns have the same name ({', '.join(columns)}); rename one")
        for number, values in enumerate(filter(None, reader), 1):
            if len(values) != len(columns):
                raise DataError(
                    f"{path.name} line {reader.line_num}: {len(values)} fields, where the header has {len(columns)}; "
                    "put fields that hold a separator in double quotes"
                )
            yield f"row {number}", dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path.name} line {reader.line_num}: broken CSV ({error}); check its quotes") from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


_READERS = {".json": _json_document, ".jsonl": _json_lines, ".csv": _csv}


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _object(row: object, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: got {type_name(row)}, wanted an object with the row's columns")
    return row


def type_name(value: object) -> str:
    """How a JSON value's type is called in messages."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
