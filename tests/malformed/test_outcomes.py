"""The helper of the malformed corpora: it lets pass only success and one clear line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parley.errors import DataError


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_success_and_one_clear_line_pass(outcome_of: Any) -> None:
    assert outcome_of(lambda: None) is None
    assert outcome_of(raising(DataError("rows.jsonl line 3: broken JSON"))) == "rows.jsonl line 3: broken JSON"


@pytest.mark.parametrize("message", ["two\nlines of it", "x " * 300, "KeyError", "an \x1b[31m escape"])
def test_other_lines_do_not(outcome_of: Any, message: str) -> None:
    error = DataError()
    error.args = (message,)  # as if ParleyError had let it through
    with pytest.raises(AssertionError):
        outcome_of(raising(error))


def test_another_exception_comes_out_as_itself(outcome_of: Any) -> None:
    with pytest.raises(KeyError):
        outcome_of(raising(KeyError("role")))


def test_a_hang_is_stopped_even_where_everything_is_caught(outcome_of: Any) -> None:
    def spin() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:  # noqa: BLE001
                pass

    with pytest.raises(BaseException, match="did not end within 1 s"):
        outcome_of(spin, limit_s=1)


def test_commands_end_in_one_line_too(outcome_of_command: Any) -> None:
    assert outcome_of_command("--version") is None
    assert "nothing to train" in outcome_of_command("train")
