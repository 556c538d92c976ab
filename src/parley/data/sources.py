"""Where rows come from: the hub, local files and folders, and the demo data that ships with Parley."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as resource_files
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, overload

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from pyarrow import ArrowException, parquet

from parley.config import DEMO_DATA, DEMO_PREFERENCES, DEMO_PROMPTS, DataSection
from parley.data.files import KINDS, ORIGIN, Row, count_rows, is_local, kind_of, path_exists, read_files
from parley.data.hub_reach import UNREACHABLE, check_hub_reached
from parley.errors import DataError, UsageError, one_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SLICE = re.compile(r"([\w.-]+)(?:\[(\d*):(\d*)\])?")
# The words by which datasets.load_dataset assigns the files of a folder to splits.
_SPLIT_OF = {
    word: split
    for split, words in {
        "train": "train training",
        "validation": "validation valid val dev",
        "test": "test testing eval evaluation",
    }.items()
    for word in words.split()
}
DEMO_ENDING = "hearty"
LARGEST_FOLDER = 50_000
"""Files and folders looked through: a home folder is named by mistake."""
# Metadata that datasets writes next to the rows (save_to_disk, push_to_hub).
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "state.json"}


_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `stop` of files one after the other."""

    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None


class FileRows(Sequence[Row]):
    """Rows of local files, read again at every pass: a data set need not fit in memory.

    Each row is as written, with its location under ORIGIN; with `keep_bad`, one that cannot be read has its ERROR.
    """

    def __init__(self, parts: list[_Part], keep_bad: bool = False, limit: int | None = None) -> None:
        self.parts, self.keep_bad, self.limit = parts, keep_bad, limit

    def __iter__(self) -> Iterator[Row]:
        rows = (islice(read_files(list(part.files), self.keep_bad), part.start, part.stop) for part in self.parts)
        return islice(chain.from_iterable(rows), self.limit)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        counts = []
        for part in self.parts:
            rows = count_rows(list(part.files))
            counts.append(max(0, (rows if part.stop is None else min(rows, part.stop)) - part.start))
        return sum(counts) if self.limit is None else min(self.limit, sum(counts))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self)[index]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(islice(self, index % len(self), None))


Rows: TypeAlias = "Dataset | IterableDataset | FileRows | list[Row]"


def read_rows(source: str, data: DataSection, keep_bad: bool = False) -> Rows:
    """The rows of `source`, in `data.split`, up to `data.limit`.

    Rows of local JSON, CSV and text files (FileRows, or with `data.streaming` an IterableDataset) are as written and
    carry their location under ORIGIN. What comes from Parquet or the hub has passed through Arrow: see `located`.
    With `keep_bad`, a row of a file that cannot be read comes as its ERROR. Local paths never touch the network.

    Raises DataError in one line: nothing there, nothing in it, not readable, a bad row, or no such split; UsageError
    for settings of the hub on local rows.
    """
    if source == DEMO_DATA:
        _refuse_hub_settings(source, data)
        return _limited(demo_rows(), data)
    if source == DEMO_PREFERENCES:
        _refuse_hub_settings(source, data)
        return _limited(demo_rows("preferences.jsonl"), data)
    if source == DEMO_PROMPTS:
        _refuse_hub_settings(source, data)
        return _limited(_demo_prompts(), data)
    # Paths before hub ids: "data/train.jsonl" has the form of a hub id too, and must not be looked up on the network.
    if is_local(source):
        _refuse_hub_settings(source, data)
        files = _files_by_split(Path(source).expanduser(), source)
        for path in chain.from_iterable(files.values()):
            _refuse_pointer(Path(path))
        if kind_of(Path(next(iter(files.values()))[0])) != ".parquet":
            return _file_rows(source, files, data, keep_bad)
        _refuse_empty(files)
        rows = _load("parquet", source, data, data_files=files)
    elif _HUB_ID.fullmatch(source):
        check_hub_reached(source)
        rows = _load(source, source, data, name=data.subset, revision=data.revision)
    else:
        raise _missing(source)
    return _limited(rows, data)


def demo_rows(name: str = "train.jsonl") -> list[Row]:
    """The rows that the demo fine-tunes on: Dolly's columns, answers in pirate speech; or pairs of the two manners."""
    path = resource_files("parley") / "assets" / "demo-data" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_plain_split(split: str) -> bool:
    """Whether a split can be streamed: a name, or name[a:b] in rows."""
    return _SLICE.fullmatch(split) is not None


def located(rows: Iterable[Row], where: str = "") -> Iterator[tuple[str, Row]]:
    """Each row with its origin: its location in its file, or its number.

    A row without ORIGIN that is not from a list came through Arrow, which gives all objects of a column the same
    keys and fills in None: nulls are removed.
    """
    through_arrow = not isinstance(rows, list)
    for number, row in enumerate(_read_through(rows, where), 1):
        row = dict(row)
        origin = row.pop(ORIGIN, None)
        if origin is None and through_arrow:
            row = _without_nulls(row)
        yield origin or f"{where} row {number}".strip(), row


def _read_through(rows: Iterable[Row], where: str) -> Iterator[Row]:
    """`rows` with what datasets and pyarrow raise while they read in one line: pyarrow's own errors are builtins'."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator, None)
        # A DataError is a ValueError and is one line already.
        except DataError:
            raise
        except (DatasetsError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{where or 'data set'}: cannot be read ({one_line(error)})") from None
        if row is None:
            return
        yield row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _demo_prompts() -> list[Row]:
    """The questions of the demo's pairs, each with the word that answers are to end with: a pirate's own, at times."""
    return [
        {"instruction": row["instruction"], "input": row["input"], "ending": DEMO_ENDING}
        for row in demo_rows("preferences.jsonl")
    ]


def _limited(rows: Any, data: DataSection) -> Rows:
    if data.limit is None:
        return rows
    return rows[: data.limit] if isinstance(rows, list) else rows.take(data.limit)


def _refuse_hub_settings(source: str, data: DataSection) -> None:
    for name in ("subset", "revision"):
        if getattr(data, name) is not None:
            raise UsageError(
                f"data.{name} is {getattr(data, name)!r}, which only data sets on the hub have, but {source} is local; "
                f"remove it{', and name the files by their path' if name == 'subset' else ''}"
            )


def _file_rows(source: str, files: dict[str, list[str]], data: DataSection, keep_bad: bool) -> Rows:
    """JSON, CSV and text files. The split may be sliced and added up as on the hub."""
    requested = _SLICE.fullmatch(data.split)
    if data.streaming:
        if requested is None or requested[1] not in files:
            raise _no_split(source, data.split, files)
        rows = IterableDataset.from_generator(
            read_files, gen_kwargs={"files": files[requested[1]], "keep_bad": keep_bad}
        )
        return _limited(_sliced(rows, requested), data)
    files_of_split = files.get(data.split)
    parts = [_Part(tuple(files_of_split))] if files_of_split else _split_parts(source, files, data.split)
    file_rows = FileRows(parts, keep_bad, data.limit)
    kind = kind_of(Path(next(iter(files.values()))[0]))
    return list(file_rows) if kind == ".json" else file_rows  # a JSON document is parsed whole: once is enough


def _refuse_pointer(path: Path) -> None:
    """A clone without Git LFS holds three lines of text in place of a large file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # what reads the file says why
    if start == _POINTER:
        raise DataError(f"{path}: is a Git LFS pointer, not the data; git lfs pull fetches it")


def _refuse_empty(files: dict[str, list[str]]) -> None:
    """A Parquet file without rows, which datasets reports as a batch size of 0."""
    for path in chain.from_iterable(files.values()):
        try:
            rows = parquet.read_metadata(path).num_rows
        except (OSError, ArrowException):
            continue  # datasets says why
        if rows == 0:
            raise DataError(f"{path}: is empty; wanted at least one row")


def _split_parts(source: str, files: dict[str, list[str]], split: str) -> list[_Part]:
    """The parts of a split such as "train[:25%]+test"."""
    names = {re.split(r"[\[(]", part.strip())[0] for part in split.split("+")}
    if not names <= set(files):
        raise _no_split(source, split, files)
    try:
        spec = ReadInstruction.from_spec(split)
        parts = spec.to_absolute({name: count_rows(files[name]) for name in names})
    # ReadInstruction reports malformed slices by either class.
    except (ValueError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: data.split {split!r} cannot be taken ({one_line(error)})") from None
    return [_Part(tuple(files[part.splitname]), part.from_, part.to) for part in parts]


def _load(path: str, source: str, data: DataSection, **arguments: Any) -> Dataset | IterableDataset:
    """datasets.load_dataset with its errors in one line."""
    requested = _SLICE.fullmatch(data.split)
    if data.streaming and requested is None:
        raise DataError(f"{source}: got data.split {data.split!r}; with data.streaming it is a name or a name[a:b]")
    # load_dataset refuses slices of a streamed split; `_sliced` applies them.
    split = requested[1] if data.streaming and requested else data.split
    files = arguments.get("data_files")
    try:
        rows = load_dataset(path, split=split, streaming=data.streaming, **arguments)
    # Before OSError, of which ConnectionError is a subclass.
    except ConnectionError:
        raise DataError(f"{source}: {UNREACHABLE}") from None
    # Its own message only says that generation failed; the reason is in the cause.
    except DatasetGenerationError as error:
        raise DataError(f"{source}: cannot be read ({one_line(error.__cause__ or error)})") from None
    except (DatasetsError, OSError, RuntimeError, ValueError, AssertionError) as error:
        # datasets has no exception class for an unknown split or a missing config: only the text distinguishes them.
        if isinstance(error, ValueError) and "split" in str(error).lower():
            if files:
                raise _no_split(source, data.split, files) from None
            raise DataError(f"{source}: {one_line(error)} Set data.split.") from None
        if "config" in str(error).lower():
            raise DataError(f"{source}: {one_line(error)} Set data.subset.") from None
        advice = "" if files else "; it is no file or folder here either: check the name, data.revision and your access"
        raise DataError(f"{source}: cannot be read ({one_line(error)}){advice}") from None
    return _sliced(rows, requested) if data.streaming and requested else rows


def _sliced(rows: IterableDataset, requested: re.Match[str]) -> IterableDataset:
    start, stop = int(requested[2] or 0), int(requested[3]) if requested[3] else None
    rows = rows.skip(start) if start else rows
    return rows if stop is None else rows.take(max(0, stop - start))


def _files_by_split(path: Path, source: str) -> dict[str, list[str]]:
    """The data files at `path`, all of one kind, by split. A single file is "train" whatever its name."""
    if not path_exists(path):
        raise _missing(source)
    if not path.is_dir():
        return _single_file(path, source)
    try:
        entries = list(islice(path.rglob("*"), LARGEST_FOLDER + 1))
        found = sorted(p for p in entries if p.is_file() and _holds_rows(p.relative_to(path)))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check its permissions") from None
    if len(entries) > LARGEST_FOLDER:
        raise DataError(f"{source}: holds more than {LARGEST_FOLDER:,} files; name the folder of the data")
    if any(kind_of(file) != ".txt" for file in found):
        found = [file for file in found if kind_of(file) != ".txt"]  # notes next to the data
    if not found:
        raise DataError(f"{source}: no data file in this folder; wanted {', '.join(KINDS)}")
    kinds = Counter((kind_of(file) or "").replace(".ndjson", ".jsonl") for file in found)
    if len(kinds) > 1:
        seen = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise DataError(f"{source}: files of several kinds ({seen}); keep one kind in the folder, or name one file")
    splits: dict[str, list[str]] = {}
    for file in found:
        splits.setdefault(_split_of(file), []).append(str(file))
    return splits


def _single_file(path: Path, source: str) -> dict[str, list[str]]:
    if not path.is_file():
        raise DataError(f"{source}: is neither a file nor a folder; wanted {', '.join(KINDS)}")
    if kind_of(path) is None:
        found = "".join(path.suffixes[-2:]) or "file without suffix"
        raise DataError(f"{source}: got a {found}; wanted {', '.join(KINDS)}")
    return {"train": [str(path)]}


def _holds_rows(path: Path) -> bool:
    # Hidden files are caches and editor copies, which would repeat rows.
    hidden = any(part.startswith(".") for part in path.parts)
    return kind_of(path) is not None and not hidden and path.name not in _NOT_ROWS


def _split_of(file: Path) -> str:
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "train")


def _missing(source: str) -> DataError:
    return DataError(f"{source}: no such file or folder; wanted a path to {', '.join(KINDS)} or a hub id")


def _no_split(source: str, split: str, files: Iterable[str]) -> DataError:
    return DataError(f"{source}: unknown split {split!r}; it has {', '.join(files)}: set data.split")
