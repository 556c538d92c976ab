"""`parley inspect DATA` without a row: the data doctor on the terminal, as JSON and before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAULTY = [
    ("What is the capital of France?", "It is Paris, of course."),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of France?", "It is Paris, of course."),
    ("Where is the café?", "The cafÃ© is around the corner."),
]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": q, "response": a}) + "\n" for q, a in FAULTY))
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_without_a_model_it_says_what_is_wrong_worst_first(parley: Callable[..., Any], faulty: Path) -> None:
    ended = parley("inspect", faulty)
    assert (ended.code, ended.err) == (0, "")
    assert "Dolly (columns instruction, response)" in ended.out
    mojibake, duplicate = ended.out.index("wrong encoding"), ended.out.index("repeat an earlier")
    one_word = ended.out.index("answer of one word")
    assert max(mojibake, duplicate) < one_word
    for cure in ("data.drop=[mojibake]", "data.drop=[duplicate]", "data.drop=[one-word-answer]"):
        assert cure in ended.out
    assert "tokens" not in ended.out


def test_json_has_the_same_and_nothing_else(parley: Callable[..., Any], faulty: Path, tiny_llama_folder: Path) -> None:
    ended = parley("inspect", faulty, "--json")
    diagnosis = json.loads(ended.out)
    assert diagnosis["rows"] == 4
    assert diagnosis["tokens"] is None
    assert {finding["check"]: finding["rows"] for finding in diagnosis["findings"]} == {
        "duplicate": {"count": 1, "first": ["rows.jsonl line 3"]},
        "mojibake": {"count": 1, "first": ["rows.jsonl line 4"]},
        "one-word-answer": {"count": 1, "first": ["rows.jsonl line 2"]},
    }
    with_tokens = json.loads(parley("inspect", faulty, "--json", "--model", tiny_llama_folder).out)
    assert with_tokens["tokens"]["count"] == 4
    assert 0 < with_tokens["supervised_tokens"] < with_tokens["tokens"]["total"]


def test_with_a_model_the_first_row_is_shown_above_the_checks(
    parley: Callable[..., Any], faulty: Path, tiny_llama_folder: Path
) -> None:
    out = words(parley("inspect", faulty, "--model", tiny_llama_folder, "--set", "model.max_seq_length=40").out)
    assert out.index("It is Paris, of course.<|eot_id|>") < out.index("tokens a row") < out.index("wrong encoding")
    assert "longer than model.max_seq_length" in out
    alone = parley("inspect", faulty, "--model", tiny_llama_folder, "--row", 1).out
    assert "wrong encoding" not in alone


def test_a_first_row_that_is_bad_is_a_finding(
    parley: Callable[..., Any], tmp_path: Path, tiny_llama_folder: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('broken\n{"instruction": "What is it?", "response": "It is a rope."}\n')
    ended = parley("inspect", path, "--model", tiny_llama_folder)
    assert (ended.code, ended.err) == (0, "")
    assert "data.bad_rows=skip" in ended.out


def test_rows_shared_with_a_second_source(parley: Callable[..., Any], faulty: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"instruction": FAULTY[1][0], "response": FAULTY[1][1]}) + "\n")
    out = words(parley("inspect", faulty, "--heldout", heldout).out)
    assert "error: held-out rows that repeat a training row (heldout.jsonl line 1)" in out
    assert "data.drop=[heldout-duplicate]" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--row", "1"], "--model"),
        (["--ids"], "--model"),
        (["--html", "row.html"], "--model"),
        (["--model", "parley-demo", "--json", "--row", "1"], "leave --row out"),
    ],
)
def test_options_without_effect_are_refused(
    parley: Callable[..., Any], faulty: Path, options: list[str], said: str
) -> None:
    ended = parley("inspect", faulty, *options)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert said in ended.err


def test_the_worst_findings_are_printed_before_training(
    parley: Callable[..., Any], faulty: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    options = ["--model", tiny_llama_folder, "--data", faulty, "--output", tmp_path / "run", "--dry-run"]
    out = words(parley("train", *options).out)
    assert "warning: rows that repeat an earlier one: 1 (rows.jsonl line 3); data.drop=[duplicate]" in out
    assert "warning: rows that hold text read with the wrong encoding: 1 (rows.jsonl line 4)" in out
    # A long path is broken over lines.
    assert f"also found: one-word-answer 1; parley inspect {faulty} says more".replace(" ", "") in out.replace(" ", "")
    dropped = words(parley("train", *options, "--set", "data.drop=[duplicate, mojibake]").out)
    assert "2 dropped: 1 by data.drop=duplicate (rows.jsonl line 3), 1 by data.drop=mojibake" in dropped
    assert "warning:" not in dropped


def test_what_the_summary_says_is_not_said_twice(
    parley: Callable[..., Any], faulty: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    faulty.write_text(faulty.read_text() + "broken\n")
    options = ["--model", tiny_llama_folder, "--data", faulty, "--output", tmp_path / "run", "--dry-run"]
    out = words(parley("train", *options, "--set", "data.bad_rows=skip").out)
    assert "1 bad row skipped (rows.jsonl line 5)" in out
    assert "rows that cannot be read" not in out
    assert out.count("repeat an earlier one") == 1


PAIR = {"prompt": "What is it?", "chosen": "It is a boat on the lake.", "rejected": "It is a<|eot_id|> thing of mine."}


def test_pairs_are_checked_and_both_answers_shown(
    parley: Callable[..., Any], tmp_path: Path, tiny_llama_folder: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"chosen": PAIR["rejected"]}) + "\n")
    ended = parley("inspect", path)
    assert (ended.code, ended.err) == (0, "")
    assert "preference pairs (columns prompt, chosen, rejected)" in ended.out
    assert "data.drop=[control-token]" in ended.out
    page = tmp_path / "row.html"
    ended = parley("inspect", path, "--model", tiny_llama_folder, "--row", 1, "--ids", "--html", page)
    assert (ended.code, ended.err) == (0, "")
    assert "line 1, chosen: " in ended.out
    assert "line 1, rejected: " in ended.out
    assert page.read_text().count("What is it?") == 2
    ended = parley("inspect", path, "--model", tiny_llama_folder, "--row", 2)
    assert ended.code == 1
    assert "chosen and rejected are the same" in ended.err
    ended = parley("inspect", path, "--set", "training.method=sft")
    assert ended.code == 1
    assert "set training.method: dpo" in ended.err
    assert "each pair as two labelled answers" in words(parley("inspect", path, "--set", "training.method=kto").out)


def test_pairs_are_checked_before_training(parley: Callable[..., Any], tmp_path: Path, tiny_llama_folder: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(PAIR) + "\n") * 2)
    ended = parley(
        "train", "--dry-run", "--model", tiny_llama_folder, "--data", path, "--output", tmp_path / "run",
        "--set", "training.method=dpo", "--set", "data.heldout_rows=0",
    )  # fmt: skip
    assert ended.code == 0
    assert "rows that hold control tokens" in words(ended.out)
    assert "rows that repeat an earlier one" in words(ended.out)


def test_a_source_of_bad_rows_alone_is_a_table_of_them(parley: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [["q", "a"]]}\n')
    ended = parley("inspect", path)
    assert (ended.code, ended.err) == (0, "")
    assert "turn 1 is a list" in words(ended.out)
