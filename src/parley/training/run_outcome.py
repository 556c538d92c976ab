"""How a run ended, as the last word of its event log, and which process wrote it: for `parley runs`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from parley.errors import ParleyError, one_line

if TYPE_CHECKING:
    from parley.training.callbacks import EventLog

OUTCOMES = ("finished", "stopped", "failed")


class Outcome:
    """`stopped`: whether the run ended early on request."""

    stopped = False


@contextmanager
def recorded_outcome(log: EventLog) -> Iterator[Outcome]:
    """Write an event `finished`, `stopped` or `failed`, with the error, when the block ends, if training had begun."""
    outcome, event = Outcome(), "failed"
    try:
        yield outcome
        event = "stopped" if outcome.stopped else "finished"
    except KeyboardInterrupt:
        event = "stopped"
        raise
    finally:
        if log.begun:
            with suppress(OSError):  # of a full disk, which is the error that is on its way already
                log.write({"event": event, "step": log.steps_done} | (_error() if event == "failed" else {}))


def _error() -> dict[str, str]:
    """The error on its way, in one line."""
    error = sys.exc_info()[1]
    if error is None:
        return {}
    return {"message": str(error) if isinstance(error, ParleyError) else f"{type(error).__name__}: {one_line(error)}"}


def process_identity() -> dict[str, Any]:
    """Where a run ran, for the `start` event. Whether it still runs is what `run.lock` says."""
    return {"host": socket.gethostname(), "pid": os.getpid()}
