from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parley.cli import inspect as inspect_module
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
    assert f"line 3: {len(rendered.input_ids)} tokens, {sum(rendered.mask)} trained" in ended.out
    assert " ".join(map(str, rendered.input_ids)) in " ".join(ended.out.split())


def test_trained_tokens_are_coloured(
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
