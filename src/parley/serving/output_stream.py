"""From the scheduler's thread to the server's event loop: the outputs of one HTTP request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from parley.inference.fan_in import FanIn, IndexedOutput
from parley.inference.scheduler import OutputChunk, Request, Scheduler
from parley.serving.errors import to_api_error


class OutputStream:
    """The outputs of several requests, to be iterated once: lists of (request index, chunk).

    A slow reader gets more chunks at a time. What waits for it is at most the outputs themselves, whose length the
    decoder bounds. An error of any request ends the iteration with an ApiError. The constructor raises what
    Scheduler.submit raises, after having cancelled the requests already submitted.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[IndexedOutput] = asyncio.Queue()
        self._fan_in = FanIn(scheduler, requests, partial(self._put, asyncio.get_running_loop()))

    def _put(self, loop: asyncio.AbstractEventLoop, item: IndexedOutput) -> None:
        if not loop.is_closed():  # a forced shutdown closes it before the scheduler
            loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, OutputChunk]]]:
        while self._fan_in.unfinished:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            chunks = []
            for index, output in map(self._fan_in.receive, items):
                if isinstance(output, Exception):
                    raise to_api_error(output) from output
                chunks.append((index, output))
            yield chunks

    def cancel(self) -> None:
        """Free the slots of unfinished requests."""
        self._fan_in.cancel()
