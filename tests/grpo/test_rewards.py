"""Reward functions: found by name or file, called with every column, and their faults said in one line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parley.errors import RewardError, UsageError
from parley.grpo.rewards import checked_reward, load_reward
from parley.rewards import ends_with, equals, last_number

COMPLETIONS = ["one", "two"]


def returning(values: Any) -> Any:
    return checked_reward(lambda **kwargs: values, "given")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ([True, None], [1.0, None]),
        ([float("nan"), 2], [None, 2.0]),
        (np.array([1.5, 2.5], dtype=np.float32), [1.5, 2.5]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        ((value for value in (3, 4)), [3.0, 4.0]),
    ],
)
def test_numbers_of_every_kind_are_rewards(values: Any, expected: list[float | None]) -> None:
    assert returning(values)(completions=COMPLETIONS) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward given: returned 1 values; wanted a list of 2 numbers, one a completion"),
        ([], "returned 0 values"),
        (None, "reward given: returned a NoneType (None); wanted a list of 2 numbers"),
        (1.0, "returned a float (1.0)"),
        ("ab", "returned a str ('ab')"),
        ({"a": 1, "b": 2}, "returned a dict"),
        (["1", "2"], "reward given: value 0 is a str ('1'); wanted a number, or None for no reward"),
        ([0.0, [1]], "value 1 is a list ([1])"),
        ([0.0, float("inf")], "value 1 is inf; wanted a finite number"),
    ],
)
def test_what_is_no_reward_is_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(RewardError) as error:
        returning(values)(completions=COMPLETIONS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exception_is_named_with_its_line() -> None:
    def broken(**kwargs: Any) -> list[float]:
        raise ValueError("first line\nsecond line")

    with pytest.raises(RewardError) as error:
        checked_reward(broken, "broken")(completions=COMPLETIONS)
    assert str(error.value).startswith("reward broken: ValueError: first line")
    assert "(test_rewards.py, line" in str(error.value)
    assert "\n" not in str(error.value)


def test_async_functions_stay_async_and_a_forgotten_one_is_said() -> None:
    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 2.0]

    assert asyncio.run(checked_reward(slow, "slow")(completions=COMPLETIONS)) == [1.0, 2.0]
    forgotten = slow(COMPLETIONS)
    with pytest.raises(RewardError, match="returned a coroutine; declare the function with async def"):
        returning(forgotten)(completions=COMPLETIONS)
    forgotten.close()


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("def f(completions, **kwargs): return []", "g", "has no function 'g'; it has f"),
        ("def f(completions): return []", "f", "takes no **kwargs"),
        ("f = 3", "f", "is a int; wanted a function"),
        ("class f: pass", "f", "is a class; wanted a function"),
        ("1 / 0", "f", "ZeroDivisionError: division by zero"),
        ("def f(:", "f", "SyntaxError"),
        ("import no_such_package", "f", "ModuleNotFoundError"),
    ],
)
def test_a_file_without_a_reward_is_refused_in_one_line(text: str, function: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError) as error:
        load_reward(f"{tmp_path}/mine.py:{function}")
    assert message in str(error.value)
    assert str(error.value).startswith("training.rewards: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["f", ":f", "mine.py:", "mine.py:f()", "mine:f.g", ".:f", "..mine:f", ""])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"training\.rewards: "):
        load_reward(name)


def test_a_module_is_found_by_its_dotted_name() -> None:
    assert load_reward("parley.rewards:ends_with") is ends_with


def test_rewards_that_come_with_parley() -> None:
    turns = [[{"role": "assistant", "content": "Arr, me Hearty!"}], [{"role": "assistant", "content": "Hearty? No."}]]
    assert ends_with(turns, ["hearty", "hearty"]) == [1.0, 0.0]
    assert ends_with(["", "ends here."], ["x", "here"]) == [0.0, 1.0]
    assert equals([" Four", "five"], ["four", "four"]) == [1.0, 0.0]
    assert last_number(["2 + 2 is 4.", "It costs 1,200.50 coins", "none"], ["#### 4", "1200.5", "3"]) == [1.0, 1.0, 0.0]
