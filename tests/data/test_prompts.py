"""Prompts of every format, what rewards get of a row, and one line for each row that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parley.config import RunConfig
from parley.data.prepare import Prepared
from parley.data.prompts import prepare_prompts
from parley.data.render import render_prompt
from parley.errors import DataError, UsageError

QUESTION = [{"role": "user", "content": "Name a fish."}]


def prepared(tokenizer: Any, folder: Path, rows: list[Any], longest: int = 200, **data: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    section = {"source": str(path), "heldout_rows": 0, "bad_rows": "error", **data}
    return prepare_prompts(RunConfig.create({"data": section}).data, tokenizer, longest)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION},
        {"question": "Name a fish."},
        {"instruction": "Name a", "input": "fish."},
        {"messages": [*QUESTION, {"role": "assistant", "content": "Cod"}]},
        {"conversations": [{"from": "human", "value": "Name a fish."}]},
        {"prompt": json.dumps(QUESTION)},
    ],
)
def test_every_format_gives_the_same_prompt(row: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    expected = [{"role": "user", "content": "Name a\n\nfish."}] if "instruction" in row else QUESTION
    data = prepared(tiny_tokenizer, tmp_path, [row])
    assert data.train["prompt"][0] == expected
    assert data.preview[0].input_ids == render_prompt(tiny_tokenizer, expected)
    assert not any(data.preview[0].mask)
    assert f"{len(data.preview[0].input_ids)} tokens of prompts" in data.summary.lines()


def test_other_columns_go_to_rewards_and_answers_to_the_report(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}", "answer": str(n), "level": n, "system": "Be short."} for n in range(30)]
    data = prepared(tiny_tokenizer, tmp_path, rows, heldout_rows=3)
    assert data.heldout is not None
    assert (len(data.train), len(data.heldout)) == (27, 3)
    assert {"prompt", "answer", "level", "origin"} <= set(data.train.column_names)
    assert data.train["prompt"][0][0] == {"role": "system", "content": "Be short."}
    assert data.heldout_examples[0].completion == [{"role": "assistant", "content": data.heldout["answer"][0]}]


def test_text_is_continued_and_names_are_mapped(tiny_tokenizer: Any, tmp_path: Path) -> None:
    data = prepared(tiny_tokenizer, tmp_path, [{"prompt": "Once upon"}])
    assert data.train["prompt"][0] == "Once upon"
    assert "plain text that answers continue" in data.summary.reason
    mapped = prepared(tiny_tokenizer, tmp_path, [{"ask": "Name a fish."}], columns={"instruction": "ask"})
    assert mapped.train["prompt"][0] == QUESTION


def test_overlong_prompts_are_dropped_or_an_error(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "Hi"}, {"question": "word " * 500}]
    data = prepared(tiny_tokenizer, tmp_path, rows)
    assert len(data.train) == 1
    assert "1 prompts longer than 200 tokens" in data.summary.dropped_line()
    with pytest.raises(DataError, match="the longest allowed is 200; raise model"):
        prepared(tiny_tokenizer, tmp_path, rows, overlong="error")


def test_tools_of_a_row_are_part_of_its_prompt(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
    data = prepared(tiny_tokenizer, tmp_path, [{"question": "Add.", "tools": tools}, {"question": "No tools."}])
    assert json.loads(data.train["tools"][0]) == tools
    assert data.preview[0].input_ids == render_prompt(tiny_tokenizer, [{"role": "user", "content": "Add."}], tools)


MALFORMED: list[tuple[list[Any], str]] = [
    ([{"prompt": ""}], "'prompt' is no text"),
    ([{"prompt": "a"}, {"prompt": None}], "has no 'prompt', as the first row has"),
    ([{"prompt": "a"}, {"prompt": 3}], "'prompt' is no text"),
    ([{"prompt": []}], "'prompt' is empty; wanted turns"),
    ([{"prompt": 3}], "'prompt' is a number"),
    ([{"prompt": [{"role": "assistant", "content": "x"}]}], "the prompt has no question"),
    ([{"prompt": [{"role": "system", "content": "x"}]}], "the prompt has no question"),
    ([{"prompt": [{"role": "robot", "content": "x"}]}], "turn 1 has role 'robot'"),
    ([{"prompt": ["x"]}], "turn 1 is text"),
    ([{"foo": "x"}], "got columns foo; wanted prompts"),
    ([{"question": " "}], "'question' is empty"),
    ([{"question": "a"}, {"prompt": "b"}], "has no 'question', as the first row has; keep one format"),
    ([{"question": "a", "image": "x.png"}], "has 'image'; Parley trains on text alone"),
    ([{"question": "a", "tools": "none"}], "field 'tools' is not JSON"),
    (["not json"], "broken JSON"),
    ([], "is empty; wanted at least one row"),
    ([{"question": "a", "x": 1}, {"question": "b", "x": "s"}], "column 'x', which rewards get, has several types"),
]


@pytest.mark.parametrize(("rows", "message"), MALFORMED)
def test_what_is_no_prompt_is_one_line(rows: list[Any], message: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        prepared(tiny_tokenizer, tmp_path, rows)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_under_a_name_that_rewards_know_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="under the name 'completions', which is a column: rename it"):
        prepared(tiny_tokenizer, tmp_path, [{"question": "a", "completions": "x"}])


@pytest.mark.parametrize(
    "data",
    [
        {"format": "messages"},
        {"streaming": True},
        {"overlong": "truncate"},
        {"train_on": "last"},
        {"drop": ["duplicate"]},
    ],
)
def test_settings_of_supervised_data_are_refused(data: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    section = RunConfig.create({"data": {"source": str(tmp_path), **data}, "training": {"max_steps": 1}}).data
    with pytest.raises(UsageError, match="is not followed with prompts"):
        prepare_prompts(section, tiny_tokenizer, 10)


def test_bad_rows_are_skipped_and_counted(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": f"Q{n}"} for n in range(40)] + [{"question": ""}]
    data = prepared(tiny_tokenizer, tmp_path, rows, bad_rows="skip")
    assert (len(data.train), data.summary.bad.count) == (40, 1)
