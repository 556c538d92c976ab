"""Rows are read as written, from where they are named, and what cannot be read is said in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, IterableDataset

from parley.config import DEMO_DATA, DataSection
from parley.data import sources
from parley.data.files import ERROR, count_rows, read_files
from parley.data.sources import FileRows, located, read_rows
from parley.errors import DataError, UsageError
from parley.library_compat.huggingface_hub import HTTPError

ROWS = [{"instruction": f"question {n}", "response": f"answer {n}"} for n in range(1, 21)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(source: str | Path, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(located(read_rows(str(source), DataSection(source=str(source), **settings))))


def refused(source: str | Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "data.json", "csv", "tsv", "parquet", "ndjson", "lines.json"])
def test_every_kind_of_file_gives_the_same_rows_without_a_network(tmp_path: Path, kind: str, streaming: bool) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        contents = {
            "jsonl": jsonl(ROWS),
            "json": json.dumps(ROWS, indent=1),
            "data.json": json.dumps({"data": ROWS}),
            "csv": "instruction,response\n" + "".join(f"{r['instruction']},{r['response']}\n" for r in ROWS),
            "ndjson": jsonl(ROWS),
            "tsv": "instruction\tresponse\n" + "".join(f"{r['instruction']}\t{r['response']}\n" for r in ROWS),
            "lines.json": jsonl(ROWS),
        }
        write(path, contents[kind])
    rows = read_rows(str(path), DataSection(streaming=streaming))
    assert isinstance(rows, IterableDataset) == streaming
    assert [row for _, row in located(rows)] == ROWS
    assert [row for _, row in read(path, streaming=streaming, limit=3)] == ROWS[:3]
    assert [row for _, row in read(path, streaming=streaming, split="train[2:5]")] == ROWS[2:5]


def test_origins_are_lines_where_a_file_has_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": "c"}')
    assert read(path) == [("rows.jsonl line 1", {"text": "a\u2028b"}), ("rows.jsonl line 3", {"text": "c"})]
    assert read(write(tmp_path / "rows.csv", "text\na\n"))[0][0] == "rows.csv row 1"


def test_json_is_kept_as_written(tmp_path: Path) -> None:
    row = {
        "day": "2024-01-01",
        "calls": [{"a": 1.0, "b": None, "long": 12345678901234567890}, {"c": 0.1234567890123456789}],
        "text": "null",
    }
    for streaming in (False, True):
        seen = read(write(tmp_path / "rows.jsonl", jsonl([row, {"text": "x"}])), streaming=streaming)[0][1]
        assert json.dumps(seen) == json.dumps(row)


def test_csv_fields_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a;b\r\n"1, 2\r\nnext ""x""";NA\r\n\r\n007;null\r\n')
    assert [row for _, row in read(path)] == [{"a": '1, 2\r\nnext "x"', "b": "NA"}, {"a": "007", "b": "null"}]


def test_none_that_arrow_filled_in_is_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows: list[dict[str, Any]] = [{"m": [{"args": {"a": 1}}]}, {"m": [{"args": {"b": "x"}}]}]
    Dataset.from_list(rows).to_parquet(path)
    assert Dataset.from_parquet(str(path))[0] == {"m": [{"args": {"a": 1, "b": None}}]}
    assert [row for _, row in read(path)] == rows


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-1.jsonl", jsonl(ROWS[:2]))
    write(tmp_path / "data" / "train-2.jsonl", jsonl(ROWS[2:4]))
    write(tmp_path / "my_test.jsonl", jsonl(ROWS[4:5]))
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".hidden" / "rows.csv", "a\n1\n")
    assert [row for _, row in read(tmp_path)] == ROWS[:4]
    assert [row for _, row in read(tmp_path, split="test")] == ROWS[4:5]
    assert [row for _, row in read(tmp_path, split="train[:25%]+test")] == [ROWS[0], ROWS[4]]
    assert [row for _, row in read(tmp_path, split="train", streaming=True)] == ROWS[:4]
    for streaming in (False, True):
        message = refused(tmp_path, split="validation", streaming=streaming)
        assert "unknown split 'validation'" in message
        assert "it has train, test" in message
    assert "data.split 'train[x:]' cannot be taken" in refused(tmp_path, split="train[x:]")


def test_parquet_folders_have_splits_too(tmp_path: Path) -> None:
    for name, rows in {"train": ROWS[:4], "test": ROWS[4:]}.items():
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    assert [row for _, row in read(tmp_path, split="test[:2]")] == ROWS[4:6]
    assert "it has test, train" in refused(tmp_path, split="dev")


def test_a_parquet_file_without_rows_is_called_empty(tmp_path: Path) -> None:
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet: is empty; wanted at least one row" in refused(str(tmp_path / "a.parquet"))


def test_the_demo_data_needs_no_file() -> None:
    rows = read(DEMO_DATA, limit=3)
    assert len(rows) == 3
    assert {"instruction", "context", "response"} <= set(rows[0][1])


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "source", ["./rows", "/nowhere/rows", "rows.jsonl", "a/rows.csv.gz", "~/nowhere", "a/b/c", "x:y"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(source: str) -> None:
    assert "no such file" in refused(source)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 1\n', "a.jsonl line 3: broken JSON (Expecting ',' delimiter"),
        ("a.jsonl", '[\n{"a": 1}\n]', "name it .json"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl line 2: got a list, wanted an object"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '[\n{"a": 1},\n{"a" 1}]', "a.json line 3: broken JSON"),
        ("a.json", '{"rows": []}', "got an object with keys rows"),
        ("a.json", "3", "got a number; wanted a list of rows"),
        ("a.json", '[{"a": 1}, "b"]', "a.json row 2: got text, wanted an object"),
        ("a.csv", "", "is empty"),
        ("a.csv", "a,b\n", "is empty"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv line 3: 3 fields, where the header has 2"),
        ("a.csv", 'a,b\n1,"2\n', "a.csv line 2: broken CSV"),
        ("a.csv", "a,a\n1,2\n", "two columns have the same name"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl line 2: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "a.jsonl line 1: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], "not a whole gzip file"),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull fetches it"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull fetches it"),
        ("a.doc", "words", "got a .doc; wanted .json, .jsonl, .ndjson, .csv, .tsv, .txt, .parquet"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    assert expected in refused(write(tmp_path / name, content))


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:2]) + "broken\n")
    assert len(read(path, limit=2)) == 2
    assert "line 3: broken JSON" in refused(path, streaming=True)


def test_folders_without_rows_and_of_several_kinds(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "")
    assert "no data file in this folder" in refused(tmp_path)
    write(tmp_path / "a.csv", "a\n1\n")
    write(tmp_path / "b.jsonl", "{}\n")
    assert "files of several kinds (1 .csv, 1 .jsonl)" in refused(tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in refused(path)


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, pattern: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rglob", denied)
    assert "cannot be read (Permission denied)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("Couldn't reach 'own/set'\non the Hub"), "the hub cannot be reached"),
        (FileNotFoundError("Dataset 'own/set' doesn't exist on the Hub"), "doesn't exist on the Hub"),
        (PermissionError("gated"), "your access"),
        (ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."), "['train', 'test']. Set data.split"),
        (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"), "['a', 'b'] Set data.subset"),
    ],
)
def test_the_hub_s_errors_take_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources, "load_dataset", fail)
    monkeypatch.setattr(sources, "check_hub_reached", lambda source: None)
    message = refused("own/set")
    assert message.startswith("own/set: ")
    assert expected in message


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        rows = Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if kwargs["streaming"] else rows

    monkeypatch.setattr(sources, "load_dataset", load)
    monkeypatch.setattr(sources, "check_hub_reached", lambda source: None)
    read("own/set", split="train[:5%]", subset="en", revision="v1")
    assert asked[0] == (("own/set",), {"split": "train[:5%]", "streaming": False, "name": "en", "revision": "v1"})
    assert [row for _, row in read("own/set", split="train[3:5]", streaming=True)] == ROWS[3:5]
    assert asked[1][1]["split"] == "train"
    assert "with data.streaming" in refused("own/set", split="train[:5%]", streaming=True)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def fail(self: object, name: str, **_: Any) -> None:
        asked.append(name)
        raise httpx_error("Name or service not known")

    httpx_error = next(kind for kind in HTTPError.__subclasses__() if kind.__name__ == "RequestError")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(sources, "load_dataset", lambda *_, **__: Dataset.from_list(ROWS))
    assert "hub cannot be reached" in refused("nobody/nothing")
    assert asked == ["nobody/nothing"]
    (tmp_path / "nobody___nothing").mkdir()
    assert len(list(read("nobody/nothing"))) == len(ROWS), "what was downloaded before was not read"


def test_an_unreachable_hub_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "hub cannot be reached" in refused("nobody/nothing")


def zstd(content: bytes) -> bytes:
    compressed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(compressed, "zstd") as stream:
        stream.write(content)
    return compressed.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
CONTENTS = {
    "jsonl": '{"text": "a"}\n{"text": "b"}\n',
    "ndjson": '{"text": "a"}\n{"text": "b"}\n',
    "json": '[{"text": "a"}, {"text": "b"}]',
    "csv": "text\na\nb\n",
    "tsv": "text\na\nb\n",
    "txt": "a\nb\n",
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_compressed_files_of_every_kind(tmp_path: Path, kind: str, compression: str) -> None:
    content = COMPRESS[compression](CONTENTS[kind].encode())
    path = write(tmp_path / f"rows.{kind}.{compression.upper()}", content)
    assert [row for _, row in read(path)] == [{"text": "a"}, {"text": "b"}]
    assert len(read_rows(path, DataSection(source=path))) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", COMPRESS)
def test_damaged_compressed_files_are_named(tmp_path: Path, compression: str) -> None:
    whole = COMPRESS[compression]("".join(f'{{"text": "{n}"}}\n' for n in range(2000)).encode())
    for name, content in {"cut": whole[: len(whole) // 2], "other": b"not compressed", "short": whole[:3]}.items():
        message = refused(write(tmp_path / f"{name}.jsonl.{compression}", content))
        assert "not a whole" in message
        assert "compress it again" in message


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "json"])
def test_a_line_without_end_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compression: str
) -> None:
    monkeypatch.setattr("parley.data.files.LONGEST_LINE", 1000)
    content = b"x" * 100_000 if kind == "txt" else b'{"text": "' + b"x" * 100_000
    path = tmp_path / f"rows.{kind}{compression and '.'}{compression}"
    assert "line of over 1,000 bytes" in refused(
        write(path, COMPRESS[compression](content) if compression else content)
    )


def test_a_document_without_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley.data.files.LARGEST_DOCUMENT", 1000)
    path = write(tmp_path / "rows.json.gz", gzip.compress(b"[" + b'{"text": "a"},\n' * 10_000))
    assert "too large for one JSON document" in refused(path)


def test_a_compressed_parquet_file_is_not_read(tmp_path: Path) -> None:
    assert "got a .parquet.gz; wanted" in refused(write(tmp_path / "rows.parquet.gz", b""))


def test_text_files_are_split_at_newlines_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", "\ufeffa\u2028b\x0bc\x85d\x1ce\rf\r\n \n  g\n")
    assert read(path) == [
        ("rows.txt line 1", {"text": "a\u2028b\x0bc\x85d\x1ce\rf"}),
        ("rows.txt line 3", {"text": "  g"}),
    ]


def test_csv_fields_may_be_of_any_length(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    path = write(tmp_path / "rows.csv", f'a,b\n1,"{long}"\n2,short\n')
    rows = iter(read_rows(path, DataSection(source=path)))
    assert next(rows)["b"] == long
    assert csv.field_size_limit() == limit  # also while the file is being read
    assert next(rows)["b"] == "short"


@pytest.mark.parametrize("name", ["rows.jsonl", "folder"])
@pytest.mark.parametrize("setting", ["subset", "revision"])
def test_settings_of_the_hub_are_refused_for_local_rows(tmp_path: Path, name: str, setting: str) -> None:
    write(tmp_path / "rows.jsonl", jsonl(ROWS))
    write(tmp_path / "folder" / "rows.jsonl", jsonl(ROWS))
    for source in (tmp_path / name, DEMO_DATA):
        with pytest.raises(UsageError, match=f"data.{setting} is 'en', which only data sets on the hub have"):
            read(source, **{setting: "en"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one.json", {"messages": [{"role": "user", "content": "q"}]}),
        ("list.json", [{"messages": [{"role": "user", "content": "q"}]}]),
        ("bare.json", [{"role": "user", "content": "q"}]),
        ("bare_list.json", [[{"role": "user", "content": "q"}]]),
        ("bare.jsonl", [{"role": "user", "content": "q"}]),
    ],
)
def test_conversations_may_stand_bare_in_a_file(tmp_path: Path, name: str, content: Any) -> None:
    rows = [row for _, row in read(write(tmp_path / name, json.dumps(content)))]
    assert rows == [{"messages": [{"role": "user", "content": "q"}]}]


def test_notes_beside_the_data_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", jsonl(ROWS))
    write(tmp_path / "LICENSE.txt", "Do as you like.")
    assert len(read(tmp_path)) == len(ROWS)
    write(tmp_path / "more.ndjson", jsonl(ROWS))
    assert len(read(tmp_path)) == 2 * len(ROWS)


def test_rows_of_files_are_a_sequence(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "rows.jsonl", jsonl(ROWS)), DataSection())
    assert isinstance(rows, FileRows)
    assert len(rows) == len(ROWS)
    assert [rows[0]["response"], rows[-1]["response"]] == ["answer 1", "answer 20"]
    assert [row["response"] for row in rows[3:5]] == ["answer 4", "answer 5"]
    with pytest.raises(IndexError):
        rows[20]
    limited = read_rows(write(tmp_path / "rows.jsonl", jsonl(ROWS)), DataSection(limit=3, split="train[10:]"))
    assert (len(limited), limited[0]["response"]) == (3, "answer 11")  # type: ignore[arg-type, index]


def test_a_file_that_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "is neither a file nor a folder" in refused(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("blank", ["\u00a0", "\u2003 \t", "\u2028", "\x1c", " \r", "\x85"])
def test_lines_are_counted_where_they_are_read(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"text": "a"}).encode()
    for lines in (
        [row, blank.encode(), row],
        [b"\xef\xbb\xbf" + blank.encode(), row],
        [b"\xef\xbb\xbf", row],
        [row, b"\xff\xfe", row],
        [row, b"  7", b"\xc2\xa0" + row],
    ):
        path.write_bytes(b"\n".join(lines) + b"\n")
        assert count_rows([str(path)]) == len(list(read_files([str(path)], keep_bad=True)))


@pytest.mark.parametrize(
    "row", ['{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "content": "a", "content": "b"}]}']
)
def test_a_key_that_is_there_twice_is_no_row(tmp_path: Path, row: str) -> None:
    good = json.dumps({"text": "good"})
    lines = write(tmp_path / "rows.jsonl", f"{good}\n{row}\n{good}\n")
    bad = list(read_files([lines], keep_bad=True))[1][ERROR]
    assert bad.startswith("rows.jsonl line 2: the key ")
    assert "is twice in {" in bad
    with pytest.raises(DataError, match="is twice in"):
        list(read_files([write(tmp_path / "rows.json", f"[{good}, {row}]")]))
