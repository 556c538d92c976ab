"""How a run ended, as the last word of its event log, and which process writes it: for `parley runs`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from parley.training.callbacks import EventLog

OUTCOMES = ("finished", "stopped", "failed")


class Outcome:
    """`stopped`: whether the run ended early because somebody asked for it."""

    stopped = False


@contextmanager
def recorded_outcome(log: EventLog) -> Iterator[Outcome]:
    """Write an event `finished`, `stopped` or `failed` when the block ends, if training had begun."""
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
                log.write({"event": event, "step": log.steps_done})


def process_identity() -> dict[str, Any]:
    """This process, for the `start` event. A process id alone is given to another process later."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}


def is_alive(started: dict[str, Any]) -> bool | None:
    """Whether the process of a `start` event still runs; None where it is another machine's, or is not said."""
    pid, when = started.get("pid"), started.get("process_started")
    if started.get("host") != socket.gethostname() or not isinstance(pid, int) or not isinstance(when, int | float):
        return None
    try:
        return 0 < pid < 2**31 and abs(psutil.Process(pid).create_time() - when) < 1
    except psutil.Error:
        return False
