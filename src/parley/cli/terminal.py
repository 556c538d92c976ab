"""The terminal: where commands write, and what the libraries below may say there."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleRenderable
from rich.logging import RichHandler
from rich.text import Text

from parley.errors import LONGEST
from parley.text import one_line, shorten_middle, visible

# Neither markup nor emoji codes: names of files, columns and models are printed as they are.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


class Stopped(Exception):
    """Ctrl-C; the message says what was kept."""


def complain(message: str) -> None:
    """One visible line on stderr, at most LONGEST characters and not wrapped, whatever the message holds."""
    line = shorten_middle(one_line(message, len(message) + 1), LONGEST)
    err.print(Text.assemble(("parley: error: ", "bold red"), line), soft_wrap=True)


class VisibleHandler(RichHandler):
    """Log records as they are: names of models and columns reach the terminal through them too."""

    def render_message(self, record: logging.LogRecord, message: str) -> ConsoleRenderable:
        return super().render_message(record, visible(message))


@contextmanager
def importing() -> Iterator[None]:
    """Import in the block what a command works with. Nothing in there is garbage, and looking for some a dozen times
    over takes a quarter of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_libraries() -> None:
    """Leave the terminal to Parley: the libraries' warnings and bars off, their errors on.

    The hub's download bars stay, since they are what a newcomer waits for.
    """
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nobody asked for
    ours = logging.getLogger("parley")  # what Parley decided is printed
    ours.handlers = [VisibleHandler(console=out, show_time=False, show_level=False, show_path=False)]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    warnings.filterwarnings("ignore", module=r"(accelerate|bitsandbytes|datasets|peft|torch|transformers|trl)\b")
