"""Where rows come from: the hub, local files and folders, and the demo data that ships with Parley."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files as resource_files
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from parley.config import DEMO_DATA, DataSection
from parley.data.files import KINDS, ORIGIN, Row, kind_of, read_files
from parley.errors import DataError, one_line

Rows: TypeAlias = "Dataset | IterableDataset | list[Row]"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SLICE = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")
_SPLIT_OF = {
    word: split
    for split, words in {
        "train": "train training",
        "validation": "validation valid val dev",
        "test": "test testing eval evaluation",
    }.items()
    for word in words.split()
}
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "state.json"}


def read_rows(source: str, data: DataSection) -> Rows:
    """The rows of `source`, in `data.split`, up to `data.limit`.

    Rows of local JSON and CSV files (a list, or with `data.streaming` an IterableDataset) are as written and carry
    their place under ORIGIN. What comes from Parquet or the hub has passed through Arrow: see `located`.
    Local paths never touch the network.

    Raises DataError in one line: nothing there, nothing in it, not readable, or no such split.
    """
    if source == DEMO_DATA:
        return _limited(demo_rows(), data)
    if is_local(source):
        files = _files_by_split(Path(source).expanduser(), source)
        kind = kind_of(Path(next(iter(files.values()))[0]))
        rows = _load("parquet", source, data, data_files=files) if kind == ".parquet" else _texts(source, files, data)
    elif _HUB_ID.fullmatch(source):
        rows = _load(source, source, data, name=data.subset, revision=data.revision)
    else:
        raise _missing(source)
    return _limited(rows, data)


def demo_rows() -> list[Row]:
    """The rows that the demo fine-tunes on: Dolly's columns, answers in pirate speech."""
    path = resource_files("parley") / "assets" / "demo-data" / "train.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_local(source: str) -> bool:
    """Whether `source` is a path: it exists, begins like one, or ends like a data file."""
    path = Path(source).expanduser()
    return source.startswith((".", "/", "~")) or kind_of(path) is not None or path.exists()


def located(rows: Iterable[Row], where: str = "") -> Iterator[tuple[str, Row]]:
    """Each row with its origin: its place in its file, or its number.

    A row without ORIGIN that is not from a list came through Arrow, which gives all objects of a column the same
    keys: the missing ones, filled with None, are taken out again.
    """
    filled = not isinstance(rows, list)
    try:
        for number, row in enumerate(rows, 1):
            row = dict(row)
            origin = row.pop(ORIGIN, None)
            if origin is None and filled:
                row = _without_nulls(row)
            yield origin or f"{where} row {number}".strip(), row
    except DatasetsError as error:
        raise DataError(f"{where or 'data set'}: cannot be read ({one_line(error)})") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _limited(rows: Rows, data: DataSection) -> Rows:
    if data.limit is None:
        return rows
    if isinstance(rows, list):
        return rows[: data.limit]
    return rows.take(data.limit)


def _texts(source: str, files: dict[str, list[str]], data: DataSection) -> Rows:
    """JSON and CSV files. The split may be sliced and added up as on the hub."""
    asked = _SLICE.fullmatch(data.split)
    if data.streaming:
        if asked is None or asked[1] not in files:
            raise _no_split(source, data.split, files)
        return _sliced(IterableDataset.from_generator(read_files, gen_kwargs={"files": files[asked[1]]}), asked)
    if data.split in files:
        return list(islice(read_files(files[data.split]), data.limit))
    names = {re.split(r"[\[(]", part.strip())[0] for part in data.split.split("+")}
    if not names <= set(files):
        raise _no_split(source, data.split, files)
    loaded = {name: list(read_files(files[name])) for name in names}
    try:
        parts = ReadInstruction.from_spec(data.split).to_absolute({name: len(rows) for name, rows in loaded.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"{source}: data.split {data.split!r} cannot be taken ({one_line(error)})") from None
    return [row for part in parts for row in loaded[part.splitname][part.from_ : part.to]]


def _load(path: str, source: str, data: DataSection, **arguments: Any) -> Dataset | IterableDataset:
    """datasets.load_dataset with its errors in one line."""
    asked = _SLICE.fullmatch(data.split)
    if data.streaming and asked is None:
        raise DataError(f"{source}: got data.split {data.split!r}; with data.streaming it is a name or a name[a:b]")
    split = asked[1] if data.streaming and asked else data.split
    files = arguments.get("data_files")
    try:
        rows = load_dataset(path, split=split, streaming=data.streaming, **arguments)
    except ConnectionError:
        raise DataError(
            f"{source}: no such file or folder here, and the hub cannot be reached; check the name or the network"
        ) from None
    except DatasetGenerationError as error:
        raise DataError(f"{source}: cannot be read ({one_line(error.__cause__ or error)})") from None
    except (DatasetsError, OSError, RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            if files:
                raise _no_split(source, data.split, files) from None
            raise DataError(f"{source}: {one_line(error)} Set data.split.") from None
        if "config" in str(error).lower():
            raise DataError(f"{source}: {one_line(error)} Set data.subset.") from None
        advice = "" if files else "; it is no file or folder here either: check the name, data.revision and your access"
        raise DataError(f"{source}: cannot be read ({one_line(error)}){advice}") from None
    return _sliced(rows, asked) if data.streaming and asked else rows


def _sliced(rows: IterableDataset, asked: re.Match[str]) -> IterableDataset:
    start, stop = int(asked[2] or 0), int(asked[3]) if asked[3] else None
    rows = rows.skip(start) if start else rows
    return rows if stop is None else rows.take(max(0, stop - start))


def _files_by_split(path: Path, source: str) -> dict[str, list[str]]:
    """The data files at `path`, all of one kind, by split. A single file is "train" whatever its name."""
    try:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _holds_rows(p.relative_to(path)))
        else:
            found = [path] if path.is_file() else []
    except PermissionError:
        raise DataError(f"{source}: cannot be read (no permission); check its permissions") from None
    if not path.exists():
        raise _missing(source)
    if not found:
        raise DataError(f"{source}: no data file in this folder; wanted {', '.join(KINDS)}")
    kinds = Counter(kind_of(file) for file in found)
    if None in kinds:
        raise DataError(f"{source}: got a {path.suffix or 'file without suffix'}; wanted {', '.join(KINDS)}")
    if len(kinds) > 1:
        seen = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=str))
        raise DataError(f"{source}: files of several kinds ({seen}); keep one kind in the folder, or name one file")
    if not path.is_dir():
        return {"train": [str(path)]}
    splits: dict[str, list[str]] = {}
    for file in found:
        splits.setdefault(_split_of(file), []).append(str(file))
    return splits


def _holds_rows(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return kind_of(path) is not None and not hidden and path.name not in _NOT_ROWS


def _split_of(file: Path) -> str:
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "train")


def _missing(source: str) -> DataError:
    return DataError(f"{source}: no such file or folder; wanted a path to {', '.join(KINDS)} or a hub id")


def _no_split(source: str, split: str, files: Iterable[str]) -> DataError:
    return DataError(f"{source}: unknown split {split!r}; it has {', '.join(files)}: set data.split")
