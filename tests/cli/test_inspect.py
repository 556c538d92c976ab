from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from parley.cli import inspect as inspect_module
from parley.data import files
from parley.data.render import render


def test_a_row_is_shown_with_its_counts_and_ids(
    parley: Callable[..., Any], rows: Path, tiny_llama_folder: Path, tiny_tokenizer: Any
) -> None:
    ended = parley("inspect", rows, "--model", tiny_llama_folder, "--row", 3, "--ids")
    assert ended.code == 0, ended.err
    rendered = render(
        tiny_tokenizer,
        [{"role": "user", "content": "What be 3 and 3?"}, {"role": "assistant", "content": "It be 6, arr."}],
    )
    assert "What be 3 and 3?<|eot_id|>" in ended.out
    assert f"line 3: {len(rendered.input_ids)} tokens, {sum(rendered.mask)} supervised" in ended.out
    assert " ".join(map(str, rendered.input_ids)) in " ".join(ended.out.split())


def test_supervised_tokens_are_coloured(
    parley: Callable[..., Any], rows: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_module, "out", Console(force_terminal=True, highlight=False))
    ended = parley("inspect", rows, "--model", tiny_llama_folder)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    before, _, after = ended.out.partition("It be 2, arr.")
    assert before.endswith("m")  # the end of an escape sequence
    assert "\x1b[0m" in after
    assert "What be 1 and 1?" in before


def test_html_is_written_when_asked(
    parley: Callable[..., Any], rows: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "row.html"
    ended = parley("inspect", rows, "--model", tiny_llama_folder, "--html", page)
    assert f"written: {page}" in ended.out
    assert "<mark>It be 2, arr." in page.read_text(encoding="utf-8")

    ended = parley("inspect", rows, "--model", tiny_llama_folder, "--html", tmp_path / "absent" / "row.html")
    assert ended.code == 1
    assert "choose another file with --html" in ended.err
    assert ended.err.count("\n") == 1


def test_only_the_last_turn_when_asked(parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path) -> None:
    path, page = tmp_path / "turns.jsonl", tmp_path / "row.html"
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = ", ".join(f'{{"role": "{role}", "content": "{content}"}}' for role, content in turns)
    path.write_text(f'{{"messages": [{messages}]}}\n', encoding="utf-8")
    parley("inspect", path, "--model", tiny_llama_folder, "--train-on", "last", "--html", page)
    html = page.read_text(encoding="utf-8")
    assert "<mark>second" in html
    assert "<mark>first" not in html


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--row", "13"], 1, "got --row 13; it has 12 rows"),
        (["--train-on", "some"], 2, "--train-on"),
        (["--model", "./absent"], 1, "absent"),
    ],
)
def test_errors_are_one_line(
    parley: Callable[..., Any], rows: Path, tiny_llama_folder: Path, options: list[str], code: int, said: str
) -> None:
    ended = parley("inspect", rows, "--model", tiny_llama_folder, *options)
    assert ended.code == code
    assert said in ended.err
    assert ended.err.count("\n") == 1


def inspected(parley: Callable[..., Any], path: Path, model: Path, *options: Any) -> str:
    ended = parley("inspect", path, "--model", model, *options)
    assert ended.code == 0, ended.err
    return " ".join(ended.out.split())


def test_settings_of_a_run_hold_here_too(parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who?", "answer": "Me.", "notes": "n"}\n')
    columns = "data.columns={instruction: question, response: answer}"
    out = inspected(parley, path, tiny_llama_folder, "--set", columns, "--set", "data.system=Be brief.")
    assert "Dolly (columns question, answer)" in out
    assert "Be brief.<|eot_id|>" in out
    assert "line 1: columns not used: notes" in out
    ended = parley("inspect", path, "--model", tiny_llama_folder, "--set", "data.colums={}")
    assert (ended.code, "did you mean 'columns'?" in ended.err) == (2, True)


def test_it_says_what_a_dry_run_says_of_the_row(
    parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [("q", "a"), ("q", ""), ("q", "long " * 100)]
    path.write_text("".join(f'{{"instruction": "{q}", "response": "{a}"}}\n' for q, a in rows))
    settings = ["--set", "model.max_seq_length=50"]
    told = parley(
        "train", "--model", tiny_llama_folder, "--data", path, "--output", tmp_path / "run", "--dry-run", *settings
    )
    assert "1 without an assistant turn (rows.jsonl line 2), 1 longer than 50 tokens" in " ".join(told.out.split())
    assert "dropped" not in inspected(parley, path, tiny_llama_folder, *settings)
    assert "line 2: dropped: without an assistant turn" in inspected(parley, path, tiny_llama_folder, "--row", 2)
    out = inspected(parley, path, tiny_llama_folder, "--row", 3, *settings)
    assert "line 3: dropped: longer than 50 tokens" in out
    assert "long long" in out  # shown all the same


def test_it_reads_no_further_than_it_shows(
    parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"instruction": "q{n}", "response": "a"}}\n' for n in range(500)))
    parse = files._parse_line
    monkeypatch.setattr(files, "_parse_line", lambda line, place: read.append(1) or parse(line, place))
    assert "q2<|eot_id|>" in inspected(parley, path, tiny_llama_folder, "--row", 3)
    assert len(read) <= 21
    assert "q29<|eot_id|>" in inspected(parley, path, tiny_llama_folder, "--row", 30)
    assert len(read) <= 21 + 31


def test_rows_of_parquet_and_of_split_sums(parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"q{n}", "response": "a"} for n in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert "q24<|eot_id|>" in inspected(parley, tmp_path / "rows.parquet", tiny_llama_folder, "--row", 25)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = inspected(parley, path, tiny_llama_folder, "--row", 2, "--set", "data.split=train[50%:]+train[:1]")
    assert "q16<|eot_id|>" in out


def test_a_bad_row_is_an_error_and_others_are_none(
    parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "q", "response": "a"}\nbroken\n')
    assert "q<|eot_id|>" in inspected(parley, path, tiny_llama_folder)
    ended = parley("inspect", path, "--model", tiny_llama_folder, "--row", 2, "--set", "data.bad_rows=skip")
    assert (ended.code, "line 2: broken JSON" in ended.err) == (1, True)


def test_settings_of_the_template_hold_here_too(
    parley: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, rows: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ mood }}" + template.read_text())
    out = inspected(parley, rows, tmp_path / "model", "--set", "data.template={mood: merry}")
    assert "merry<|begin_of_text|>" in out
