"""Python's garbage collector during training.

A full collection looks at every object of the process, half a million of them once torch and transformers are imported,
and stops the host in the middle of a step for as long as a step takes. What exists before training is there to stay.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Collections leave out the objects that exist now. Where others have frozen objects already, nothing changes."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is garbage now would be kept until the end
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
