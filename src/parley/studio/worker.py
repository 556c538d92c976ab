"""Calls that import torch, in a process of its own: the pages stay quick, and its memory is freed when it idles."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import psutil

from parley.errors import DeviceError, UsageError
from parley.quiet_libraries import quiet_libraries
from parley.studio.child import begin_child

Result = TypeVar("Result")
IDLE_SECONDS = 120.0  # importing torch takes some seconds, and half a GiB stays with it


class Worker:
    """Runs one call at a time, in the order they came, in a process that is started for the first and kept for a while.

    The process holds the context of a GPU once it has asked how much of it is free, so that it is ended before a run
    starts (`close`) and when nothing was called for `idle_seconds`. `prepare` is its first call.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS, prepare: Callable[[], object] = quiet_libraries) -> None:
        self._idle_seconds, self._prepare = idle_seconds, prepare
        self._process: _Process | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`; function, arguments and result are pickled. Raises what it raises.

        Raises DeviceError where the process was killed, as Linux does where memory runs out, and UsageError where the
        call was abandoned.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self._process is None:
            self._process = _Process(self._prepare)
        process = self._process
        process.calls += 1
        try:
            return await asyncio.wrap_future(process.pool.submit(function, *args))
        except (BrokenProcessPool, asyncio.CancelledError) as error:
            if process.is_abandoned:
                raise UsageError("another data set was chosen meanwhile; reload the page") from None
            if isinstance(error, asyncio.CancelledError):  # the caller is gone
                raise
            if process is self._process:
                self.close()
            raise DeviceError(
                "the studio's own process ended, most likely for lack of memory; end other programs, then try again"
            ) from None
        finally:
            process.calls -= 1
            if process is self._process and not process.calls:
                self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self.close)

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def abandon(self) -> None:
        """End the process where a call runs, such as a download that takes long: nobody waits for its result."""
        process = self._process
        if process is not None and process.calls:
            self.close(cancel=True)
            process.kill()

    def close(self, *, cancel: bool = False) -> None:
        """End the process once its calls are done, with `cancel` without those that wait; the next starts another."""
        if self._process is not None:
            self._process.pool.shutdown(wait=False, cancel_futures=cancel)
            self._process = None


class _Process:
    """A pool of one process, with the number of calls that wait for it or run in it."""

    def __init__(self, prepare: Callable[[], object]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
        self.pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin_child, initargs=(prepare,))
        self.calls = 0
        self.is_abandoned = False
        self._pid: Future[int] = self.pool.submit(os.getpid)

    def kill(self) -> None:
        self.is_abandoned = True
        # The pool hands over a call or two ahead, which it cannot cancel: a process that is starting is killed as soon
        # as its pid is known.
        self._pid.add_done_callback(_kill)


def _kill(pid: Future[int]) -> None:
    if not pid.cancelled() and pid.exception() is None:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid.result()).kill()
