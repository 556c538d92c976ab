"""The terminal: where commands write, and what the libraries below may say there."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Stopped(Exception):
    """Ctrl-C, with what was kept."""


def complain(message: str) -> None:
    """One line on stderr, not wrapped, whatever the message holds."""
    err.print(Text.assemble(("parley: error: ", "bold red"), " ".join(message.split())), soft_wrap=True)


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
    ours = logging.getLogger("parley")  # what Parley decided is said
    ours.handlers = [RichHandler(console=out, show_time=False, show_level=False, show_path=False)]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    warnings.filterwarnings("ignore", module=r"(accelerate|bitsandbytes|datasets|peft|torch|transformers|trl)\b")
