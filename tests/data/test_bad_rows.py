"""Bad rows: left out, counted, bounded and kept; with data.bad_rows=error an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parley.config import DataSection
from parley.data.doctor.row_reader import row_reader
from parley.data.preference_recognition import preference_format
from parley.data.prepare import Prepared, prepare, read_examples
from parley.data.sources import located, read_rows
from parley.errors import DataError

GOOD = [{"instruction": f"question {n}?", "response": f"answer {n}."} for n in range(6)]
BAD_LINES = {
    "broken JSON": '{"instruction": "q", "respo',
    "not UTF-8": b'{"instruction": "caf\xe9", "response": "a"}',
    "not an object": '"words"',
    "a number for text": '{"instruction": "q", "response": 5}',
    "half a character": '{"instruction": "q", "response": "\\ud83d"}',
    "another format": '{"text": "words"}',
    "refused by the template": '{"instruction": "<|begin_of_text|>", "response": "a"}',
}


def lines(*rows: Any) -> bytes:
    encoded = [json.dumps(row).encode() if isinstance(row, dict) else row for row in rows]
    return b"\n".join(row.encode() if isinstance(row, str) else row for row in encoded) + b"\n"


@pytest.fixture
def prepared(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    def of(*rows: Any, name: str = "rows.jsonl", **settings: Any) -> Prepared:
        path = tmp_path / name
        path.write_bytes(lines(*rows))
        defaults = {"source": str(path), "heldout_rows": 0, "control_tokens": "tokens"}
        return prepare(DataSection(**(defaults | settings)), tiny_tokenizer, 256)

    return of


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_is_skipped_and_counted(prepared: Any, line: Any, streaming: bool) -> None:
    data = prepared(*GOOD[:3], line, *GOOD[3:], streaming=streaming)
    assert len(list(data.train)) == 6
    assert (data.summary.rows, data.summary.kept) == (7, 6)
    assert (data.summary.bad.count, data.summary.bad.first) == (1, ["rows.jsonl line 4"])
    assert any(
        said.startswith("1 bad row skipped (rows.jsonl line 4); the first: rows.jsonl line 4: ")
        for said in data.summary.lines()
    )


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_on_demand_it_is_an_error_that_names_the_setting(prepared: Any, line: Any) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl line 4: .*data\.bad_rows=skip leaves such rows out"):
        prepared(*GOOD[:3], line, *GOOD[3:], bad_rows="error")


def test_a_first_row_that_is_bad_decides_no_format(prepared: Any) -> None:
    assert prepared("broken", *GOOD).summary.format == "dolly"


def test_what_is_held_out_stays_the_same_where_rows_are_bad(prepared: Any) -> None:
    rows = [{"instruction": f"question {n}?", "response": f"answer {n}."} for n in range(40)]
    whole = prepared(*rows, heldout_rows=4)
    kept = {example.origin for example in whole.heldout_examples}
    bad = next(n for n in range(40) if f"rows.jsonl line {n + 1}" not in kept)
    rows[bad] = "broken"  # type: ignore[call-overload]
    assert {example.origin for example in prepared(*rows, heldout_rows=4).heldout_examples} == kept


def test_more_than_the_limit_are_an_error(prepared: Any) -> None:
    assert prepared(*GOOD, "broken", "broken", bad_rows_limit=2).summary.bad.count == 2
    error = r"3 of 9 rows are bad, data\.bad_rows_limit allows 2; the last: rows\.jsonl line 9: "
    with pytest.raises(DataError, match=error):
        prepared(*GOOD, "broken", "broken", "broken", bad_rows_limit=2)
    with pytest.raises(DataError, match=r"1 of 7 rows are bad, data\.bad_rows_limit allows 0"):
        prepared(*GOOD, "broken", bad_rows_limit=0)


def test_ten_rows_and_one_in_twenty_may_be_bad(prepared: Any) -> None:
    assert prepared(*GOOD, *["broken"] * 10).summary.bad.count == 10
    with pytest.raises(DataError, match=r"11 of 17 rows are bad, data\.bad_rows_limit allows 0\.05 of the rows"):
        prepared(*GOOD, *["broken"] * 11)
    assert prepared(*GOOD * 38, *["broken"] * 12).summary.bad.count == 12
    with pytest.raises(DataError, match="13 of 241 rows"):
        prepared(*GOOD * 38, *["broken"] * 13)
    assert prepared(*GOOD, *["broken"] * 11, bad_rows_limit=0.9).summary.bad.count == 11


def test_a_file_of_bad_rows_ends_early(prepared: Any) -> None:
    """One in twenty of the first thousand; a stream as well, whose end is not known."""
    for streaming in (False, True):
        with pytest.raises(DataError, match="51 of 57 rows"):
            prepared(*GOOD, *["broken"] * 200, streaming=streaming)


def test_bad_rows_to_hold_out_are_counted(prepared: Any, tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(lines({"instruction": "other?", "response": "yes"}, "broken"))
    said = prepared(*GOOD, heldout=str(path)).summary.lines()
    assert any(line.startswith("of the rows to hold out, 1 dropped: 1 bad (") for line in said)


def test_none_left_says_what_was_wrong(prepared: Any) -> None:
    with pytest.raises(DataError, match=r"nothing left to train on; 1 bad, the first: rows\.jsonl line 1: field"):
        prepared(BAD_LINES["a number for text"])


def test_rows_are_kept_in_a_file(prepared: Any, tmp_path: Path) -> None:
    data = prepared(*GOOD[:3], *BAD_LINES.values())
    data.bad_rows.write_to(tmp_path / "bad_rows.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["origin"] for entry in entries] == [f"rows.jsonl line {n}" for n in range(4, 11)]
    assert entries[3]["row"] == {"instruction": "q", "response": 5}
    assert entries[4]["row"]["response"] == "\ud83d"
    assert entries[6]["row"]["messages"][0]["content"] == "<|begin_of_text|>"
    assert all(entry["error"].startswith(entry["origin"]) for entry in entries)


def test_a_stream_keeps_each_row_once(prepared: Any, tmp_path: Path) -> None:
    data = prepared(*GOOD * 5, "broken", streaming=True)
    data.bad_rows.write_to(tmp_path / "bad_rows.jsonl")
    for _ in range(2):
        assert len(list(data.train)) == 30
        assert data.summary.bad.count == 1
    assert len((tmp_path / "bad_rows.jsonl").read_text().splitlines()) == 1


def test_rows_of_csv_are_skipped_too(prepared: Any) -> None:
    rows = ["instruction,response", "q1,a1", "too,many,fields", '"quote"x,a', "q2,a2"]
    data = prepared(*rows, name="rows.csv")
    assert data.summary.bad.first == ["rows.csv row 2", "rows.csv row 3"]
    assert len(data.train) == 2


def test_examples_are_read_without_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*GOOD, BAD_LINES["a number for text"]))
    assert len(list(read_examples(DataSection(source=str(path), bad_rows="skip"))[1])) == 6
    with pytest.raises(DataError, match="line 7"):
        list(read_examples(DataSection(source=str(path), bad_rows="error"))[1])


UNREADABLE = {
    "utf-16": ('{"instruction": "a"}\n'.encode("utf-16"), "line 1: not UTF-8 (byte 0xff); save the file as UTF-8"),
    "one document": (b'[{"text": "a"}, {"text": "b"}]', "line 1: got a list of 2 objects, wanted one row"),
    "python": (b"{'instruction': 'a'}\n" * 3, "line 1: broken JSON (Expecting property name"),
    "repeated keys": (b'{"a": 1, "a": 2}\n', "line 1"),
}


@pytest.mark.parametrize("form", UNREADABLE)
@pytest.mark.parametrize("kind", ["supervised", "pairs", None])
def test_a_file_of_which_no_row_can_be_read_is_not_called_empty(tmp_path: Path, form: str, kind: Any) -> None:
    content, expected = UNREADABLE[form]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    data = DataSection(source=str(path))
    with pytest.raises(DataError) as caught:
        row_reader(located(read_rows(data.source, data, keep_bad=True)), data, kind)
    assert "rows.jsonl " + expected in str(caught.value)
    assert "empty" not in str(caught.value)


def test_a_run_and_its_preferences_say_why_no_row_can_be_read(prepared: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    data = DataSection(source=str(path))
    with pytest.raises(DataError, match=r"line 1: not UTF-8.*; nor can the 1 after it be read"):
        read_examples(data)
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        preference_format(located(read_rows(data.source, data, keep_bad=True)), data, data.source, labelled=False)
