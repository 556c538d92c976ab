"""What commands share: consoles, error lines, renamed options, missing extras, quiet libraries."""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import TypeVar

from rich.console import Console, ConsoleRenderable
from rich.logging import RichHandler
from rich.text import Text

from parley.errors import LONGEST, UsageError
from parley.text import one_line, print_text, shorten_middle, visible

# Neither markup nor emoji codes: names of files, columns and models are printed as they are.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

Value = TypeVar("Value")


class Stopped(Exception):
    """Ctrl-C or another signal that ends a command; the message says what was kept. `code` is the exit code."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.code = 128 + signal_number  # as a shell reports a process that a signal ended


@dataclass
class Interrupts:
    seen: bool = False


@contextmanager
def watch_interrupts() -> Iterator[Interrupts]:
    """Ctrl-C raises KeyboardInterrupt, as ever, and sets `seen`.

    Python drops an exception that is raised in a destructor or a weakref callback, which the garbage collector may run
    anywhere: without the flag such a Ctrl-C would be lost. In the main thread only.
    """
    interrupts = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        interrupts.seen = True  # no lock, as threading.Event has: the handler may run inside any of its calls
        signal.default_int_handler(number, frame)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def rank_prefix() -> str:
    """`rank 1: ` where a launcher started several processes."""
    return f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def is_first_process() -> bool:
    """Whether this is the one process, of those that a launcher started, that prints."""
    return not rank_prefix() or os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """Print an error on one visible line of stderr, unwrapped and at most LONGEST characters long."""
    prefix = f"parley: error: {rank_prefix()}"
    line = shorten_middle(one_line(message, len(message) + 1), LONGEST - len(prefix))
    # soft_wrap keeps the error on one line for scripts, however narrow the terminal.
    err.print(Text.assemble((prefix, "bold red"), line), soft_wrap=True)


class VisibleHandler(RichHandler):
    """Escapes control characters in log records, which may hold names of models and columns."""

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        return super().render_message(record, visible(message))


def renamed_option(old: str, old_value: Value | None, new: str, new_value: Value) -> Value:
    """The value of an option whose old name is read for one more version, with a line that says the new one."""
    if old_value is None:
        return new_value
    print_text(err, f"parley: {old} is now {new}; the old name goes with the next version", wrap=False)
    return old_value


def require_extra(extra: str, *modules: str) -> None:
    """Raises UsageError where a package of an optional dependency group is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; pip install 'parley-llm[{extra}]'")


@contextmanager
def importing() -> Iterator[None]:
    """Import a command's libraries without garbage collection, which would take a quarter of the import time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_libraries() -> None:
    """Turn off the libraries' warnings and progress bars, and print Parley's own log."""
    from parley.quiet_libraries import quiet_libraries

    quiet_libraries()
    parley_logger = logging.getLogger("parley")  # Parley's own decisions are printed
    parley_logger.handlers = [VisibleHandler(console=out, show_time=False, show_level=False, show_path=False)]
    parley_logger.setLevel(logging.INFO if is_first_process() else logging.CRITICAL)
    # Propagated records would be printed a second time by the root handler.
    parley_logger.propagate = False
