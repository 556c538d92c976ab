"""Calls that import torch, in a process of its own: the pages stay quick, and its memory is freed when it idles."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from parley.errors import DeviceError
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
        self._pool: ProcessPoolExecutor | None = None
        self._calls = 0
        self._timer: asyncio.TimerHandle | None = None

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)`; function, arguments and result are pickled. Raises what it raises.

        Raises DeviceError where the process was killed, as Linux does where memory runs out.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may deadlock
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin_child, initargs=(self._prepare,))
        pool = self._pool
        self._calls += 1
        try:
            return await asyncio.wrap_future(pool.submit(function, *args))
        except BrokenProcessPool:
            self.close()
            raise DeviceError(
                "the studio's own process ended, most likely for lack of memory; end other programs, then try again"
            ) from None
        finally:
            self._calls -= 1
            if not self._calls:
                self._timer = asyncio.get_running_loop().call_later(self._idle_seconds, self.close)

    @property
    def is_running(self) -> bool:
        return self._pool is not None

    def close(self, *, cancel: bool = False) -> None:
        """End the process once its calls are done, or with `cancel` the one that runs; the next call starts another."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=cancel)
            self._pool = None
