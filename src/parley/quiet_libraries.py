"""Turn off the warnings and progress bars of the libraries in this process; their errors stay."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """For a program that prints by itself. The hub's download bars stay: a first run waits for downloads."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used
    warnings.filterwarnings("ignore", module=r"(accelerate|bitsandbytes|datasets|peft|torch|transformers|trl)\b")
