"""Reward functions: where they come from, and what is made of their answers.

A reward function is a user's program. It runs where a user names it: in Python, on a command line, or in the YAML
file of that command; never because a run's folder names it (see `trusted_rewards`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parley.errors import ParleyError, RewardError, UsageError, one_line

Reward = Callable[..., Any]

FORM = "module:function or path/to/file.py:function"
BUILT_IN = "parley.rewards"
"""The module whose functions a run's folder may name, too."""


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """The functions of `training.rewards`; executes the modules and files that they are in.

    Raises UsageError, in one line, for a name without a function, and for what a module raises.
    """
    return [load_reward(name) for name in names]


def load_reward(name: str) -> Reward:
    place, separator, function = name.rpartition(":")
    if not separator or not place or not function.isidentifier():
        raise UsageError(f"training.rewards: got {name!r}; wanted {FORM}")
    module = _run_file(name, Path(place)) if is_file_name(place) else _import(name, place)
    try:
        found = vars(module)[function]
    except KeyError:
        own = {key: value for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"}
        there = sorted(key for key, value in own.items() if value.__module__ == module.__name__)
        raise UsageError(
            f"training.rewards: {place} has no function {function!r}; it has {', '.join(there) or 'none'}"
        ) from None
    if not callable(found):
        raise UsageError(f"training.rewards: {name} is a {type(found).__name__}; wanted a function")
    return _checked_signature(name, found)


def is_file_name(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def is_built_in(name: str) -> bool:
    """Whether a reward comes with Parley, so that it can be trusted wherever it is named."""
    return name.rpartition(":")[0] == BUILT_IN


def _run_file(name: str, path: Path) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"training.rewards: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"parley_rewards_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"training.rewards: {path} is no Python file; wanted {FORM}")
    module = importlib.util.module_from_spec(spec)
    return _executed(name, lambda: (spec.loader.exec_module(module), module)[1])  # type: ignore[union-attr]


def _import(name: str, place: str) -> Any:
    try:
        there = importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):  # of a parent package, or of a name that is none
        there = False
    if not there:
        raise UsageError(f"training.rewards: no module {place!r} can be imported from here; wanted {FORM}")
    return _executed(name, lambda: importlib.import_module(place))


def _executed(name: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:  # the user's module runs here
        raise UsageError(f"training.rewards: {name}: {type(error).__name__}: {one_line(error, 200)}") from error


def _checked_signature(name: str, function: Reward) -> Reward:
    """Raises UsageError for what cannot be called as TRL calls rewards: with names, and more of them later."""
    if isinstance(function, type):
        raise UsageError(f"training.rewards: {name} is a class; wanted a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a function in C
        return function
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise UsageError(
            f"training.rewards: {name} takes no **kwargs; rewards are called with prompts, completions, completion_ids "
            "and every column of the data: add **kwargs to its parameters"
        )
    return function


def checked_reward(function: Reward, name: str) -> Reward:
    """`function`, whose faults end training with one line in place of a traceback; async where it is."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        @functools.wraps(function)
        async def call_async(**kwargs: Any) -> list[float | None]:
            with _one_line_errors(name):
                values = await function(**kwargs)
            return _checked_values(name, values, kwargs["completions"])

        return call_async

    @functools.wraps(function)
    def call(**kwargs: Any) -> list[float | None]:
        with _one_line_errors(name):
            values = function(**kwargs)
        return _checked_values(name, values, kwargs["completions"])

    return call


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Raises RewardError with the place in the user's function for whatever it raises."""
    try:
        yield
    except ParleyError:
        raise
    except Exception as error:  # the user's function runs here
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise RewardError(f"reward {name}: {type(error).__name__}: {one_line(error, 200)}{place}") from error


def _checked_values(name: str, values: Any, completions: Sequence[Any]) -> list[float | None]:
    """One number, or None, for each completion. Raises RewardError."""
    wanted = f"wanted a list of {len(completions)} numbers, one a completion"
    if inspect.isawaitable(values):
        raise RewardError(f"reward {name}: returned a coroutine; declare the function with async def")
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise RewardError(f"reward {name}: returned {_shown(values)}; {wanted}")
    values = list(values)
    if len(values) != len(completions):
        raise RewardError(f"reward {name}: returned {len(values)} values; {wanted}")
    return [_checked_value(name, index, value) for index, value in enumerate(values)]


def _checked_value(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = None if isinstance(value, str | bytes) else float(value)  # NumPy's and torch's numbers, too
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise RewardError(f"reward {name}: value {index} is {_shown(value)}; wanted a number, or None for no reward")
    if math.isinf(number):
        raise RewardError(f"reward {name}: value {index} is {number}; wanted a finite number, or None for no reward")
    return None if math.isnan(number) else number


def _shown(value: Any) -> str:
    return f"a {type(value).__name__} ({one_line(ValueError(repr(value)), 60)})"
