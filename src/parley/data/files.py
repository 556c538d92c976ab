"""Rows of local JSON, JSON-lines, CSV and text files, as they are written and with their location in the file.

They do not pass through Arrow, which would give every tool call the arguments of all others (as None), read dates
out of text, and name no line when something is wrong.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from parley.data.compression import COMPRESSIONS, DAMAGED, open_file
from parley.data.values import RepeatedKeyError, short, type_name, unique_keys
from parley.errors import DataError, one_line

Row = dict[str, Any]
Entry: TypeAlias = "tuple[str, Row | DataError]"
"""A row or what is wrong with it, with its location in the file: "line 12"."""

ORIGIN = "__origin__"
"""The key under which a row of a local file has its location: "rows.jsonl line 12"."""
ERROR = "__error__"
"""The key under which a row that could not be read has the reason; such a row has no columns."""

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")
# A JSON document that is one object is a single row if it has one of these keys, not a container of rows.
_ROW_KEYS = {"messages", "conversations", "conversation", "instruction", "prompt", "text", "input_ids"}
_CSV_BATCH = 64
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_COMPRESSION_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_ONE_DOCUMENT = "; the file looks like one JSON document: name it .json"
# A small compressed file may hold one line without end, and a JSON document is read whole.
LONGEST_LINE, LARGEST_DOCUMENT = 2**30, 4 * 2**30  # bytes
_ANY_LENGTH = 2**31 - 1  # of a CSV field, in characters: the largest limit that the csv module takes everywhere


def kind_of(path: Path) -> str | None:
    """Which of KINDS a file is by its name, a compression's suffix set aside; None for others."""
    name = path.name.lower()
    compressed = name.endswith(COMPRESSIONS)
    name = name[: name.rindex(".")] if compressed else name
    kind = next((kind for kind in KINDS if name.endswith(kind)), None)
    # Parquet is read from its footer with seeks, which a compressed stream does not support.
    return None if compressed and kind == ".parquet" else kind


def is_local(source: str) -> bool:
    """Whether `source` is a path: it exists, begins like one, or ends like a data file."""
    path = Path(source)
    return source.startswith((".", "/", "~")) or kind_of(path) is not None or path_exists(path)


def path_exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have (NUL, too long) is nothing."""
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def read_files(files: list[str], keep_bad: bool = False) -> Iterator[Row]:
    """The rows of JSON, CSV or text files one after the other, each with its ORIGIN.

    Raises DataError naming the line; with `keep_bad`, a single row that cannot be read comes as its ERROR instead.
    """
    for file in files:
        path = Path(file)
        empty = True
        for location, row in _READERS[kind_of(path) or ".jsonl"](path):
            empty = False
            if not isinstance(row, DataError):
                yield {**row, ORIGIN: f"{path.name} {location}"}
            elif keep_bad:
                yield {ORIGIN: f"{path.name} {location}", ERROR: str(row)}
            else:
                raise row
        # Otherwise a failed export among several files would go unnoticed.
        if empty:
            raise DataError(f"{path}: is empty; wanted at least one row")


def readable_rows(rows: Iterable[tuple[str, Row]], count: int) -> list[tuple[str, Row]]:
    """The first `count` of `rows` (origin and row) that could be read.

    Raises the first row's error where none could: their file is not empty, but of another encoding or notation.
    """
    found: list[tuple[str, Row]] = []
    first_error, bad = "", 0
    for origin, row in rows:
        if ERROR not in row:
            found.append((origin, row))
            if len(found) == count:
                break
        else:
            first_error, bad = first_error or row[ERROR], bad + 1
    if bad and not found:
        raise DataError(first_error + (f"; nor can the {bad - 1:,} after it be read" if bad > 1 else ""))
    return found


def count_rows(files: list[str]) -> int:
    """How many rows `read_files` gives, bad ones included."""
    count = 0
    for file in files:
        kind = kind_of(Path(file)) or ".jsonl"
        count += sum(1 for _ in _COUNTERS.get(kind, _READERS[kind])(Path(file)))
    return count


def read_lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """The numbered lines of a UTF-8 file, split at newlines alone; a byte-order mark is set aside.

    A line that is not UTF-8 comes as a DataError; a file that cannot be read raises one.
    """
    # Bytes are split before they are decoded: str.splitlines also splits at U+2028, which JSON strings may hold, and
    # a line that is not UTF-8 must not hide the number of the next one.
    for number, line in enumerate(_raw_lines(path), 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield number, DataError(f"{path.name} line {number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with open_file(path) as stream:
            for line in iter(partial(stream.readline, LONGEST_LINE), b""):
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}: has a line of over {LONGEST_LINE:,} bytes; wanted a row on each line")
                yield line
    except DAMAGED as error:
        raise _damaged(path, error) from None
    except OSError as error:
        # gzip and bz2 report damaged data as an OSError without errno; one with errno comes from the operating system.
        if error.errno is None:
            raise _damaged(path, error) from None
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not a whole {_COMPRESSION_NAMES.get(path.suffix.lower())} file ({one_line(error)}); compress it again"
    )


def _json_lines(path: Path) -> Iterator[Entry]:
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield f"line {number}", line
        elif line.strip():
            yield f"line {number}", _parse_line(line, f"{path.name} line {number}")


def _parse_line(line: str, location: str) -> Row | DataError:
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        hint = _ONE_DOCUMENT if line.strip() in ("[", "{") else ""
        return DataError(f"{location}: {_what_is_wrong(error)}{hint}")
    if isinstance(row, list) and row and all(isinstance(item, dict) for item in row) and not _is_conversation(row):
        return DataError(f"{location}: got a list of {len(row):,} objects, wanted one row{_ONE_DOCUMENT}")
    return _as_row(row, location)


def _lines_of_document(path: Path) -> Iterator[str]:
    size = 0
    for _, line in read_lines(path):
        text = _readable_line(line)
        size += len(text)
        if size > LARGEST_DOCUMENT:
            raise DataError(f"{path}: is over {LARGEST_DOCUMENT:,} bytes, too large for one JSON document; use .jsonl")
        yield text


def _json_document(path: Path) -> Iterator[Entry]:
    """A list of rows, {"data": [...]}, a single row, or, as many files named .json are, JSON lines."""
    text = "".join(_lines_of_document(path))
    if not text.strip():
        return
    try:
        rows = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        # json.loads stops after the first object of JSON lines with this message.
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _json_lines(path)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name}{line}: {_what_is_wrong(error)}") from None
    if _is_single_row(rows):
        rows = [rows]
    if isinstance(rows, dict):
        if not isinstance(rows.get("data"), list):
            keys = short(", ".join(map(str, rows)), quoted=False) or "none"
            raise DataError(f'{path}: got an object with keys {keys}; wanted a list of rows or {{"data": [...]}}')
        rows = rows["data"]
    if not isinstance(rows, list):
        raise DataError(f'{path}: got {type_name(rows)}; wanted a list of rows or {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _as_row(row, f"{path.name} row {number}")


def _csv(path: Path) -> Iterator[Entry]:
    """Rows of strings. Fields of a .tsv file are separated by tabs, of a .csv file by what its header has most of."""
    lines = (_readable_line(line) for _, line in read_lines(path))
    header = next(lines, "")
    # csv.Sniffer looks at the cells as well, where the punctuation of prose misleads it.
    separator = "\t" if kind_of(path) == ".tsv" else max(",;\t", key=header.count)
    # strict: otherwise an unclosed quote makes the rest of the file one field, without an error.
    reader = csv.reader(chain([header], lines), delimiter=separator, strict=True)
    records = (record for record in _csv_records(reader, path) if record[1])
    _, columns = next(records, (0, []))
    if isinstance(columns, DataError):
        raise columns
    # dict() would keep the last of them and drop the others without a message.
    if len(set(columns)) < len(columns):
        raise DataError(f"{path.name}: two columns have the same name ({short(', '.join(columns))}); rename one")
    for number, (line, values) in enumerate(records, 1):
        if isinstance(values, DataError):
            yield f"row {number}", values
        elif len(values) != len(columns):
            yield (
                f"row {number}",
                DataError(
                    f"{path.name} line {line}: {len(values)} fields, where the header has {len(columns)}; "
                    "put fields that hold a separator in double quotes"
                ),
            )
        else:
            yield f"row {number}", dict(zip(columns, values, strict=True))


def _csv_records(reader: Any, path: Path) -> Iterator[tuple[int, list[str] | DataError]]:
    """The reader's records with the line each ends at."""
    ended = False
    while not ended:
        batch: list[tuple[int, list[str] | DataError]] = []
        with _fields_of_any_length():  # and nothing is yielded inside, where other code would run under that limit
            while not ended and len(batch) < _CSV_BATCH:
                try:
                    values = next(reader, None)
                except csv.Error as error:
                    reason = f"broken CSV ({error}); check its quotes"
                    batch.append((reader.line_num, DataError(f"{path.name} line {reader.line_num}: {reason}")))
                    continue
                if values is None:
                    ended = True
                else:
                    batch.append((reader.line_num, values))
        yield from batch


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The csv module's limit on a field, 131,072 characters, is process-wide, so it is restored."""
    limit = csv.field_size_limit(_ANY_LENGTH)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _text(path: Path) -> Iterator[Entry]:
    """A row of text a line; blank lines are left out."""
    for number, line in read_lines(path):
        if isinstance(line, DataError):
            yield f"line {number}", line
        elif line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


_READERS = {
    ".json": _json_document,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _text,
}


def _json_lines_of(path: Path) -> Iterator[bytes]:
    """The lines that `_json_lines` gives as rows."""
    for number, line in enumerate(_raw_lines(path), 1):
        stripped = line.strip()
        # Bytes know only the white space of ASCII; text that is blank has others, U+00A0 for one, or a byte-order mark.
        if stripped and (stripped[0] in b"{[" or not _is_blank(line, number)):
            yield line


def _is_blank(line: bytes, number: int) -> bool:
    try:
        return not line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        return False


_COUNTERS = {".jsonl": _json_lines_of, ".ndjson": _json_lines_of}
"""Kinds whose rows can be counted without being parsed."""


def _readable_line(line: str | DataError) -> str:
    """A line of a file whose rows are not lines: what is wrong with one is wrong with the file."""
    if isinstance(line, DataError):
        raise line
    return line


def _what_is_wrong(error: Exception) -> str:
    return str(error) if isinstance(error, RepeatedKeyError) else f"broken JSON ({_reason(error)})"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _as_row(row: object, location: str) -> Row | DataError:
    if isinstance(row, dict):
        return row
    if _is_conversation(row):
        return {"messages": row}
    return DataError(f"{location}: got {type_name(row)}, wanted an object with the row's columns")


def _is_single_row(document: object) -> bool:
    if not isinstance(document, dict):
        return _is_conversation(document)
    return not isinstance(document.get("data"), list) and not _ROW_KEYS.isdisjoint(document)


def _is_conversation(value: object) -> bool:
    """Whether `value` is a list of turns: a conversation without a column of its own."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )
