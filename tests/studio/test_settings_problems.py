"""Errors of settings by their lines; their texts are the command's."""

from __future__ import annotations

import pytest

from parley.config import RunConfig
from parley.errors import UsageError
from parley.safe_yaml import load_yaml
from parley.studio.settings_problems import Problem, problem_of, problems


def test_valid_settings_have_no_problems() -> None:
    assert problems("") == problems("model: a\ntraining:\n  max_steps: 3\n") == []


def test_each_error_has_its_line_and_the_commands_words() -> None:
    text = "model:\n  nme: x\ntraining:\n  # a comment\n  max_steps: lots\nlora: {r: 0}\n"
    found = problems(text)
    assert [problem.line for problem in found] == [2, 5, 6]
    for problem, lines in zip(found, (text[:16], "training:\n  max_steps: lots", "lora: {r: 0}"), strict=True):
        with pytest.raises(UsageError) as error:
            RunConfig.create(load_yaml(lines, "x"))
        assert str(error.value) == problem.message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("model: a\nmodel: b\n", 2, "key 'model' is there twice"),
        ("training:\n  seed: 1\n  seed: 2\n", 3, "key 'seed' is there twice"),
        ("a: [1\nb: 2\n", 2, "expected ',' or ']'"),
        ("- a\n", 1, "got a list"),
        ("data: {streaming: true}\n", None, "data.streaming has no known length"),
        ("bogus: 1\n", 1, "unknown key 'bogus'"),
        ("a: !!python/name:os.system x\n", None, "tag"),
        ("a: &a [*a]\n", None, "alias"),
        ("date: 2024-13-45\n", None, "month must be in 1..12"),
        ("model: a" + " " * 300_000, None, "over 256 KiB"),
        ("[" * 200, None, "nested over 30 deep"),
    ],
)
def test_broken_text_is_one_line_with_its_place(text: str, line: int | None, message: str) -> None:
    (problem,) = problems(text)
    assert problem.line == line
    assert message in problem.message


def test_errors_found_later_are_put_beside_the_setting_they_name() -> None:
    text = "model: a\ntraining:\n  seed: 1\n  optim: adm\n"
    assert problem_of(UsageError("training.optim: got adm"), text) == Problem("training.optim: got adm", 4)
    assert problem_of(UsageError("unknown key 'training.lr' in"), text).line == 2
    assert problem_of(UsageError("data.source: no such file"), text).line is None
