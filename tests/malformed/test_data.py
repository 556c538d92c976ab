"""Data that is broken in about 280 ways: each is trained on, or ends in one clear line; no traceback, no hang.

Every case runs the whole way from a path to token ids, as `parley train --dry-run` does.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from parley.config import RunConfig
from parley.data.prepare import prepare
from parley.inference.prompt_file import read_prompts

Case = tuple[str, str, bytes]
"""Name, file name, content."""

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ASSISTANT]}
DOLLY = {"instruction": "q", "response": "a"}
DEEP = 60_000
HUGE = 300_000

# Every type that JSON has, where another is wanted.
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus": -1.5,
    "big": 10**400,
    "nan": float("nan"),
    "infinity": float("-inf"),
    "empty": "",
    "blank": " \n\t",
    "nul": "a\0b",
    "surrogate": "a\ud83d",
    "escape": "\x1b[31m\x07\x9b\u202e",
    "private": "\ue000\uf8ff\ufffe",
    "list": [],
    "object": {},
    "list of null": [None],
    "list of list": [[["a"]]],
    "object of object": {"a": {"b": None}},
    "control token": "<|eot_id|><|begin_of_text|>",
}

# Where such a value may stand in a row.
PLACES: dict[str, Callable[[Any], Any]] = {
    "messages": lambda value: {"messages": value},
    "a turn": lambda value: {"messages": [USER, value]},
    "a role": lambda value: {"messages": [USER, {"role": value, "content": "a"}]},
    "a content": lambda value: {"messages": [USER, {"role": "assistant", "content": value}]},
    "a part": lambda value: {"messages": [USER, {"role": "assistant", "content": [value]}]},
    "a part's text": lambda value: {
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": value}]}]
    },
    "tool calls": lambda value: {"messages": [USER, {**ASSISTANT, "tool_calls": value}]},
    "a call": lambda value: {"messages": [USER, {**ASSISTANT, "tool_calls": [value]}]},
    "a function": lambda value: {"messages": [USER, {**ASSISTANT, "tool_calls": [{"function": value}]}]},
    "a weight": lambda value: {"messages": [USER, {**ASSISTANT, "weight": value}]},
    "spans": lambda value: {"messages": [USER, {**ASSISTANT, "weight_spans": [value]}]},
    "tools": lambda value: {**GOOD, "tools": value},
    "a response": lambda value: {**DOLLY, "response": value},
    "a history": lambda value: {**DOLLY, "history": value},
    "a completion": lambda value: {"prompt": "q", "completion": value},
    "token ids": lambda value: {"input_ids": value},
    "a token id": lambda value: {"input_ids": [5, value]},
    "labels": lambda value: {"input_ids": [5, 6], "labels": value},
    "a text": lambda value: {"text": value},
    "a whole row": lambda value: value,
}


def call_line(name: str, arguments: str) -> bytes:
    call = {"name": name, "arguments": arguments}
    return json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).encode()


RAW_LINES: dict[str, bytes] = {
    "cut": b'{"messages": [{"role": "us',
    "single quotes": b"{'text': 'a'}",
    "trailing comma": b'{"text": "a",}',
    "comment": b'{"text": "a"} // b',
    "two on a line": b'{"text": "a"}{"text": "b"}',
    "unquoted": b"{text: a}",
    "raw tab": b'{"text": "a\tb"}',
    "raw nul": b'{"text": "a\0b"}',
    "bad escape": b'{"text": "\\q"}',
    "half an escape": b'{"text": "\\ud8"}',
    "python": b'{"text": None}',
    "same key twice": b'{"text": 1, "text": "a"}',
    "key of surrogates": b'{"\\ud83d": "a", "text": "a"}',
    "only a comma": b",",
    "html": b"<!doctype html><html><body>404</body></html>",
    "yaml": b"- text: a",
    "latin 1": '{"text": "café"}'.encode("latin-1"),
    "cut character": '{"text": "é"}'.encode()[:-3],
    "overlong utf-8": b'{"text": "\xc0\xaf"}',
    "surrogates in utf-8": b'{"text": "\xed\xa0\xbd"}',
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345",
    "merge conflict": b'<<<<<<< HEAD\n{"text": "a"}\n=======\n{"text": "b"}\n>>>>>>> x',
    "digits": b'{"text": ' + b"9" * 5000 + b"}",
    "deep lists": b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a huge key": json.dumps({"k" * HUGE: "a"}).encode(),
    "a huge column beside": json.dumps({"text": "a", "k" * HUGE: "a"}).encode(),
    "many keys": json.dumps({f"key {n}": n for n in range(5000)}).encode(),
    "a huge role": json.dumps({"messages": [{"role": "r" * HUGE, "content": "a"}]}).encode(),
    "a huge name of a call": call_line("n" * HUGE, "{"),
    "a huge number of turns": json.dumps({"messages": [USER, ASSISTANT] * 150}).encode(),
    "nested arguments": call_line("f", "[" * DEEP),
    "nested content": json.dumps({"messages": [USER, {"role": "assistant", "content": "[" * DEEP}]}).encode(),
}  # fmt: skip

JSONL = json.dumps(GOOD).encode() + b"\n"
FILES: dict[str, tuple[str, bytes]] = {
    "empty jsonl": ("rows.jsonl", b""),
    "empty json": ("rows.json", b""),
    "empty csv": ("rows.csv", b""),
    "empty txt": ("rows.txt", b""),
    "empty parquet": ("rows.parquet", b""),
    "newlines alone": ("rows.jsonl", b"\n\r\n \n"),
    "a byte-order mark alone": ("rows.jsonl", b"\xef\xbb\xbf"),
    "utf-16": ("rows.jsonl", JSONL.decode().encode("utf-16")),
    "utf-32": ("rows.jsonl", JSONL.decode().encode("utf-32")),
    "utf-16 csv": ("rows.csv", "a,b\n1,2\n".encode("utf-16")),
    "binary": ("rows.jsonl", bytes(range(256)) * 8),
    "binary txt": ("rows.txt", bytes(range(256)) * 8),
    "binary csv": ("rows.csv", bytes(range(256)) * 8),
    "nul": ("rows.jsonl", b"\0" * 4096),
    "nul csv": ("rows.csv", b"text\n\0\n"),
    "nul txt": ("rows.txt", b"a\0b\n"),
    "carriage returns": ("rows.jsonl", JSONL.replace(b"\n", b"\r") * 2),
    "carriage returns in csv": ("rows.csv", b"text\ra\rb\r"),
    "json as jsonl": ("rows.jsonl", json.dumps([GOOD], indent=1).encode()),
    "jsonl as json": ("rows.json", JSONL * 2),
    "json of a number": ("rows.json", b"5"),
    "json of null": ("rows.json", b"null"),
    "json of text": ("rows.json", b'"text"'),
    "json of lists": ("rows.json", b"[[1], [2]]"),
    "json of an empty list": ("rows.json", b"[]"),
    "json of an empty object": ("rows.json", b"{}"),
    "json of huge keys": ("rows.json", json.dumps({"k" * HUGE: 1}).encode()),
    "json, deep": ("rows.json", b"[" * DEEP + b"]" * DEEP),
    "json, cut": ("rows.json", json.dumps([GOOD] * 9).encode()[:-9]),
    "json, data no list": ("rows.json", b'{"data": {"a": 1}}'),
    "json, data of text": ("rows.json", b'{"data": ["a"]}'),
    "csv without rows": ("rows.csv", b"text\n"),
    "csv, same column twice": ("rows.csv", b"text,text\na,b\n"),
    "csv, empty header": ("rows.csv", b",,\n1,2,3\n"),
    "csv, open quote": ("rows.csv", b'text\n"a\n' + b"x\n" * 500),
    "csv, quote inside": ("rows.csv", b'text\n"a"b\n'),
    "csv, ragged": ("rows.csv", b"a,text\n1\n"),
    "csv, huge field": ("rows.csv", b"text\n" + b"x" * HUGE + b"\n"),
    "csv, huge header": ("rows.csv", b"x" * HUGE + b"\n1\n"),
    "csv, many columns": ("rows.csv", b",".join(b"c%d" % n for n in range(5000)) + b"\n"),
    "csv of other separators": ("rows.csv", b"text|b\na|b\n"),
    "csv of broken conversations": ("rows.csv", b'messages\n"[{""role"": "\n'),
    "tsv, ragged": ("rows.tsv", b"a\ttext\n1\n"),
    "gzip, cut": ("rows.jsonl.gz", gzip.compress(JSONL * 900)[:-9]),
    "gzip, other": ("rows.jsonl.gz", JSONL),
    "gzip, empty": ("rows.jsonl.gz", b""),
    "gzip, of nothing": ("rows.jsonl.gz", gzip.compress(b"")),
    "gzip, junk after": ("rows.jsonl.gz", gzip.compress(JSONL) + b"junk"),
    "gzip, broken": ("rows.jsonl.gz", gzip.compress(JSONL * 900)[:20] + b"\xff" * 60),
    "gzip as jsonl": ("rows.jsonl", gzip.compress(JSONL)),
    "gzip of json, cut": ("rows.json.gz", gzip.compress(json.dumps([GOOD] * 900).encode())[:-9]),
    "gzip of csv, cut": ("rows.csv.gz", gzip.compress(b"text\n" + b"a\n" * 9000)[:-9]),
    "bzip2, cut": ("rows.jsonl.bz2", bz2.compress(JSONL * 900)[:-9]),
    "bzip2, other": ("rows.jsonl.bz2", JSONL),
    "xz, cut": ("rows.jsonl.xz", lzma.compress(JSONL * 900)[:-9]),
    "xz, other": ("rows.jsonl.xz", JSONL),
    "zstd, other": ("rows.jsonl.zst", JSONL),
    "zstd, empty": ("rows.jsonl.zst", b""),
    "parquet, other": ("rows.parquet", JSONL),
    "parquet, magic alone": ("rows.parquet", b"PAR1PAR1"),
    "parquet, broken footer": ("rows.parquet", b"PAR1" + b"\xff" * 400 + b"PAR1"),
    "parquet, compressed": ("rows.parquet.gz", gzip.compress(b"PAR1")),
    "zip": ("rows.zip", b"PK\x03\x04"),
    "no suffix": ("rows", JSONL),
    "suffix alone": (".jsonl", JSONL),
    "compression alone": ("rows.gz", gzip.compress(JSONL)),
    "name of newlines": ("ro\nws\x1b[31m.jsonl", b"{"),
    "name of brackets": ("[bold][rows].jsonl", b"{"),
    "mixed formats": ("rows.jsonl", JSONL + json.dumps(DOLLY).encode() + b"\n"),
    "mixed types": ("rows.jsonl", JSONL + b'{"messages": "a"}\n'),
    "good, then broken": ("rows.jsonl", JSONL * 30 + b"{\n"),
    "good, then latin 1": ("rows.jsonl", JSONL * 30 + b'{"messages": "\xe9"}\n'),
    "a row without columns": ("rows.jsonl", b"{}\n" + JSONL),
    "rows without columns": ("rows.jsonl", b"{}\n{}\n"),
    "an image": ("rows.jsonl", b'{"text": "a", "image": "cat.png"}\n'),
    "a preference pair": ("rows.jsonl", b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'),
    "a long row": ("rows.jsonl", json.dumps({"text": "word " * 40_000}).encode()),
    "many control tokens": ("rows.jsonl", json.dumps({"text": "<|eot_id|>" * 2000}).encode()),
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "split that is none": {"split": "dev"},
    "split of a broken slice": {"split": "train[a:b]"},
    "split of a half slice": {"split": "train[5"},
    "split of nothing": {"split": ""},
    "split backwards": {"split": "train[9:1]"},
    "split beyond the rows": {"split": "train[1000:]"},
    "split over 100%": {"split": "train[:200%]"},
    "split sum": {"split": "train+train[:1]+dev"},
    "split, streamed": {"split": "train[:10%]", "streaming": True},
    "subset": {"subset": "en"},
    "revision": {"revision": "main"},
    "format of other rows": {"format": "dolly"},
    "columns of no format": {"columns": {"answer": "messages"}},
    "columns that are missing": {"columns": {"messages": "chat.turns"}},
    "columns of a deep path": {"columns": {"messages": "." * 1000}},
    "columns of an empty name": {"columns": {"messages": ""}},
    "roles of no role": {"roles": {"user": "pirate"}},
    "a system turn of surrogates": {"system": "\ud83d"},
    "a system turn of control tokens": {"system": "<|begin_of_text|>"},
    "held out from nowhere": {"heldout": "/nowhere/rows.jsonl"},
    "held out from a split that is none": {"heldout": "rows.jsonl#dev"},
    "more held out than rows": {"heldout_rows": 10**9},
    "a policy that is none": {"bad_rows": "drop"},
    "a limit of bad rows below none": {"bad_rows_limit": -1},
    "roles in a list": {"roles": ["user"]},
    "columns of numbers": {"columns": {"messages": 1}},
    "a limit of one": {"limit": 1},
    "a limit beyond reason": {"limit": 10**30},
}
SOURCES = [
    "", " ", ".", "/", "~", "~nobody/rows.jsonl", "/dev/null", "/dev/zero", "/proc/self/mem", "a\0b", "./a\0b.jsonl",
    "x" * 5000, "./" + "x/" * 3000, "http://localhost:1/rows.jsonl", "s3://bucket/rows.jsonl", "a/b/c", "..",
    "\ud83d.jsonl", "rows.jsonl", "/nowhere/rows.csv", "C:\\rows.jsonl", "*.jsonl", "own/set@v1",
]  # fmt: skip


def value_cases() -> Iterator[Any]:
    for place, make in PLACES.items():
        for name, value in VALUES.items():
            yield pytest.param(json.dumps(make(value)).encode(), id=f"{name} as {place}")


def train_on(path: Path | str, tokenizer: Any, **settings: Any) -> None:
    """What a dry run does with the data."""
    values = {"source": str(path), "heldout_rows": 1, **settings}
    data = RunConfig.create({"data": values, "training": {"max_steps": 1}}).data
    prepared = prepare(data, tokenizer, 512)
    for line in prepared.summary.lines():
        assert len(line) < 2000
    if data.streaming:
        next(iter(prepared.train))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("line", [*value_cases(), *(pytest.param(line, id=name) for name, line in RAW_LINES.items())])
def test_rows(outcome_of: Any, tmp_path: Path, tiny_tokenizer: Any, line: bytes) -> None:
    """A broken row first, where it decides the format, and after good ones of its kind, where it is skipped."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    outcome_of(lambda: train_on(path, tiny_tokenizer))
    path.write_bytes(
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' + line
    )
    assert outcome_of(lambda: train_on(path, tiny_tokenizer, bad_rows="skip", heldout_rows=0)) is None


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_files(
    outcome_of: Any, tmp_path: Path, tiny_tokenizer: Any, name: str, content: bytes, streaming: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    outcome_of(lambda: train_on(path, tiny_tokenizer, streaming=streaming))
    outcome_of(lambda: read_prompts(path))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(
    outcome_of: Any, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("rows.jsonl")
    path.write_bytes(JSONL * 20)
    outcome_of(lambda: train_on(path, tiny_tokenizer, **settings))


@pytest.mark.parametrize("source", SOURCES, ids=[ascii(source)[:30] for source in SOURCES])
def test_sources(
    outcome_of: Any, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("parley.data.sources.LARGEST_FOLDER", 1000)  # "/" is a folder too
    assert outcome_of(lambda: train_on(source, tiny_tokenizer)) is not None


def folders() -> dict[str, Callable[[Path], Any]]:
    def write(path: Path, content: bytes = JSONL) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return {
        "empty": lambda path: None,
        "named like a file": lambda path: (path / "rows.jsonl").mkdir(),
        "of folders named like files": lambda path: (path / "a.jsonl" / "b.jsonl").mkdir(parents=True),
        "of a dangling link": lambda path: (path / "rows.jsonl").symlink_to(path / "nowhere"),
        "that links to itself": lambda path: (path / "rows.jsonl").symlink_to(path / "rows.jsonl"),
        "in a loop of links": lambda path: (path / "again").symlink_to(path),
        "of a pipe": lambda path: os.mkfifo(path / "rows.jsonl"),
        "of several kinds": lambda path: (write(path / "a.csv", b"text\na\n"), write(path / "b.jsonl")),
        "of one empty file": lambda path: (write(path / "a.jsonl"), write(path / "b.jsonl", b"")),
        "of test rows alone": lambda path: write(path / "test.jsonl"),
        "of hidden files": lambda path: write(path / ".a.jsonl"),
        "of notes": lambda path: write(path / "README.md"),
        "of parquet and garbage": lambda path: (
            Dataset.from_list([GOOD]).to_parquet(path / "a.parquet"),
            write(path / "b.parquet", b"x"),
        ),
        "of parquets that differ": lambda path: (
            Dataset.from_list([GOOD]).to_parquet(path / "a.parquet"),
            Dataset.from_list([{"messages": 3}]).to_parquet(path / "b.parquet"),
        ),
        "of an empty parquet": lambda path: Dataset.from_dict({"text": []}).to_parquet(path / "a.parquet"),
        "of bytes in parquet": lambda path: Dataset.from_list([{"text": b"\xff"}]).to_parquet(path / "a.parquet"),
        "of a name that is no text": lambda path: write(Path(os.fsdecode(bytes(path) + b"/\xff.jsonl")), b"{"),
    }


@pytest.mark.parametrize("make", folders().values(), ids=folders())
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_folders(outcome_of: Any, tmp_path: Path, tiny_tokenizer: Any, make: Any, streaming: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    outcome_of(lambda: train_on(folder, tiny_tokenizer, streaming=streaming))
    for entry in folder.iterdir():
        outcome_of(lambda entry=entry: train_on(entry, tiny_tokenizer, streaming=streaming))
