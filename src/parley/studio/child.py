"""What every process that the studio starts for its own work does first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import parent_process


def begin_child(prepare: Callable[[], object]) -> None:
    """End with the studio, whatever ends it; leave Ctrl-C to the studio; then `prepare`."""
    # A terminal sends Ctrl-C to the whole process group: the child would print a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parley-parent", daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    # A pool's workers hold both ends of their queue, so that a parent that is killed would leave them waiting.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
