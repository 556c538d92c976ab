"""What every corpus of malformed inputs asserts: success, or one clear line; nothing else, and no hang.

`outcome_of(action)` runs a Python call, `outcome_of_command("train", ...)` a command in this process. Both return the
error's line, or None for success, so that a case may also say what it wants to read.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from parley.errors import ParleyError
from parley.text import visible

TIME_LIMIT_S = 10
"""A guard against hangs, far above what any case takes."""
MAX_CHARACTERS = 500
EXIT_CODES = (0, 1, 2)


class Hung(BaseException):
    """Raised inside a case that does not end. A BaseException, so that no handler of the code under test keeps it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hung(f"did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_line(line: str) -> None:
    """One printable line of bounded length that is more than an exception's name."""
    assert len(line) <= MAX_CHARACTERS, f"{len(line):,} characters: {line[:200]}..."
    assert " " in line.strip(), f"no sentence: {line!r}"
    assert line == " ".join(visible(line).split()), f"control characters or several lines: {line[:200]!r}"
    assert "Traceback" not in line


@pytest.fixture
def outcome_of() -> Callable[..., str | None]:
    """`outcome_of(action)`: the line of the ParleyError that `action` raises, or None where it succeeds.

    Any other exception fails the test as itself, with its traceback.
    """

    def outcome(action: Callable[[], Any], limit_s: int = TIME_LIMIT_S) -> str | None:
        try:
            with time_limit(limit_s):
                action()
        except ParleyError as error:
            check_line(str(error))
            return str(error)
        return None

    return outcome


@pytest.fixture
def outcome_of_command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str | None]]:
    """`outcome_of_command("train", "--model", ...)`: the one line on stderr, or None for exit code 0."""
    import datasets
    import transformers

    from parley.cli.main import main

    def outcome(*arguments: Any, limit_s: int = TIME_LIMIT_S) -> str | None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, time_limit(limit_s):
            main([str(argument) for argument in arguments])
        code, printed = ended.value.code, capsys.readouterr()
        assert code in EXIT_CODES, f"exit code {code}: {printed.err[-500:]}"
        assert "Traceback" not in printed.out + printed.err
        if code == 0:
            return None
        line = printed.err.removesuffix("\n")
        check_line(line)
        return line

    verbosity = transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    yield outcome
    transformers.utils.logging.set_verbosity(verbosity[0])
    transformers.utils.logging.enable_progress_bar()
    datasets.utils.logging.set_verbosity(verbosity[1])
    datasets.enable_progress_bars()
