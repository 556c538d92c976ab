from __future__ import annotations

import json
from pathlib import Path

import pytest

from parley.errors import DataError, UsageError
from parley.inference.prompt_file import read_prompts


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    asked = read_prompts(write(tmp_path, "q.txt", "\ufeffAhoy!\n\n  Who be you?\n"))
    assert [row.messages for row in asked] == [
        [{"role": "user", "content": "Ahoy!"}],
        [{"role": "user", "content": "  Who be you?"}],
    ]
    assert [row.origin for row in asked] == ["q.txt line 1", "q.txt line 3"]
    assert asked[0].row == {"prompt": "Ahoy!"}


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
def test_json_rows_are_prompts_or_messages_and_keep_their_columns(tmp_path: Path, name: str) -> None:
    rows = [
        {"id": 1, "prompt": "Ahoy!"},
        {"messages": [{"role": "system", "content": "Hi"}, {"from": "human", "value": "b"}]},
    ]
    lines = [json.dumps(row) for row in rows]
    asked = read_prompts(write(tmp_path, name, json.dumps(rows) if name == "q.json" else "\n".join(lines)))
    assert [row.row for row in asked] == rows
    assert asked[0].messages == [{"role": "user", "content": "Ahoy!"}]
    assert asked[1].messages == [{"role": "system", "content": "Hi"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.jsonl", '{"prompt": "a"}\n{"prompt": 3}', r"q\.jsonl line 2: field 'prompt' is a number"),
        ("q.jsonl", '{"prompt": "a"}\n{"pro', r"q\.jsonl line 2: broken JSON"),
        ("q.jsonl", '{"prompt": " "}', r"q\.jsonl line 1: the prompt is empty"),
        ("q.jsonl", '{"text": "a", "id": 1}', r"line 1: has text, id; wanted prompt or messages"),
        (
            "q.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "line 1: the messages end with the assistant",
        ),
        ("q.json", '[{"prompt": "a"}, 3]', r"q\.json row 2: got a number"),
        ("q.txt", "\n \n", "is empty; wanted at least one row"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(write(tmp_path, name, text))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes(b"Ahoy!\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"q\.txt line 2: not UTF-8"):
        read_prompts(path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_prompts(tmp_path / "q.txt")
    with pytest.raises(UsageError, match=r"wanted a \.txt file"):
        read_prompts(write(tmp_path, "q.csv", "prompt\nAhoy!\n"))
