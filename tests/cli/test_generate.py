from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parley.config import GenerationSection
from parley.inference.generate import Generator, generate
from parley.training.run_folder import RunFolder

GREEDY = GenerationSection(temperature=0, min_p=0, max_new_tokens=8)  # the run's own settings
QUESTIONS = ["Ahoy!", "And the sea?", "What be the time? " * 9]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(QUESTIONS), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("options", [[], ["--plain"], ["--base"], ["--max-num-seqs", "1"]])
def test_answers_are_the_run_s_in_the_file_s_order(
    parley: Callable[..., Any], run: RunFolder, prompts: Path, tmp_path: Path, options: list[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    ended = parley("generate", prompts, "--model", run.path, "--output", output, *options)
    assert ended.code == 0, ended.err
    model, tokenizer = run.load()
    asked = [[{"role": "user", "content": question.rstrip()}] for question in QUESTIONS]
    expected = generate(model, tokenizer, asked, GREEDY, base="--base" in options, engine="plain")
    assert rows_of(output) == [{"prompt": q, "answer": a} for q, a in zip(QUESTIONS, expected, strict=True)]
    assert ended.err.splitlines()[-1] == f"3 prompts are answered in {output}"
    assert list(tmp_path.glob("*.partial")) == []


def test_several_answers_with_columns_kept_and_a_system_turn(
    parley: Callable[..., Any], run: RunFolder, tmp_path: Path
) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"id": 7, "prompt": "Ahoy!"}\n', encoding="utf-8")
    settings = ["--set", "temperature=5", "--set", "seed=1", "--n", "3"]
    texts = []
    for name, system in (("a", []), ("b", []), ("c", ["--system", "You are a pirate."])):
        ended = parley("generate", source, "--model", run.path, "--output", tmp_path / name, *settings, *system)
        assert ended.code == 0, ended.err
        (row,) = rows_of(tmp_path / name)
        assert (row["id"], len(set(row["answers"]))) == (7, 3)
        texts.append(row["answers"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--set", "temprature=1"], 2, "did you mean 'temperature'?"),
        (["--set", "temperature=-1"], 2, "generation.temperature: got -1"),
        (["--set", "temperature"], 2, "wanted KEY=VALUE"),
        (["--model", "/nope"], 1, "/nope: no such folder"),
        (["--system", "be \udcff"], 1, "--system holds half a character"),
        (["--output", "/nope/answers.jsonl"], 2, "/nope: no such folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    parley: Callable[..., Any], prompts: Path, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    output = tmp_path / "answers.jsonl"
    ended = parley("generate", prompts, "--output", output, *options)
    assert (ended.code, ended.err.count("\n")) == (code, 1)
    assert said in ended.err
    assert not output.exists()


def test_answers_that_are_there_are_not_overwritten_unless_told(
    parley: Callable[..., Any], run: RunFolder, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("precious", encoding="utf-8")
    ended = parley("generate", prompts, "--model", run.path, "--output", output)
    assert (ended.code, output.read_text()) == (2, "precious")
    assert "--overwrite" in ended.err
    assert parley("generate", prompts, "--model", run.path, "--output", output, "--overwrite").code == 0
    assert len(rows_of(output)) == 3


def test_ctrl_c_keeps_what_was_answered(
    parley: Callable[..., Any], run: RunFolder, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[tuple[int, str]]:
        yield 0, "first"
        yield 2, "third"
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "answers_or_errors", interrupted)
    output = tmp_path / "answers.jsonl"
    ended = parley("generate", prompts, "--model", run.path, "--output", output)
    assert ended.code == 130
    assert "2 of 3 prompts are answered in" in ended.err
    assert not output.exists()
    kept = rows_of(tmp_path / "answers.jsonl.partial")
    assert [(row["prompt"], row["answer"]) for row in kept] == [(QUESTIONS[0], "first"), (QUESTIONS[2], "third")]


def test_one_prompt_that_is_too_long_does_not_keep_the_others(
    parley: Callable[..., Any], run: RunFolder, tmp_path: Path
) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": 1, "prompt": "Ahoy!"}, {"id": 2, "prompt": "sea " * 9000}, {"id": 3, "prompt": "And the sea?"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ended = parley("generate", source, "--model", run.path, "--output", output)
    first, second, third = rows_of(output)
    assert [row["id"] for row in (first, second, third)] == [1, 2, 3]
    assert "answer" in first
    assert "answer" in third
    assert "model's context is" in second["error"]
    assert ended.code == 1
    told = ended.err.splitlines()
    assert told[-2] == f"2 prompts are answered in {output}"
    assert "1 of 3 prompts were not answered, the first at prompts.jsonl line 2: the conversation is" in told[-1]


def test_the_old_name_of_an_option_is_read_with_a_line(
    parley: Callable[..., Any], run: RunFolder, prompts: Path, tmp_path: Path
) -> None:
    ended = parley("generate", prompts, "--model", run.path, "--output", tmp_path / "a.jsonl", "--slots", "2")
    assert ended.code == 0, ended.err
    assert "--slots is now --max-num-seqs" in ended.err
    assert "--slots" not in parley("generate", "--help").out


def test_other_columns_are_written_back_whatever_they_hold(
    parley: Callable[..., Any], run: RunFolder, tmp_path: Path
) -> None:
    """A lone surrogate, which JSON can write and UTF-8 cannot, among them."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"note": "\\ud800 é", "prompt": "Ahoy!"}\n', encoding="utf-8")
    ended = parley("generate", source, "--model", run.path, "--output", output)
    assert ended.code == 0, ended.err
    assert rows_of(output)[0]["note"] == "\ud800 é"
