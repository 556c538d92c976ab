"""From the scheduler's thread to the server's event loop: the answers to one HTTP request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from parley.inference.fan_in import FanIn, IndexedOutput
from parley.inference.scheduler import OutputChunk, Request, Scheduler
from parley.serving.errors import api_error


class Answers:
    """Several answers under way, to be iterated once: what was written since the last look, as (which, chunk).

    A reader that looks seldom gets more at a time and so keeps up. ApiError ends all answers.

    What waits here for a slow reader is at most the answers themselves, whose length the decoder's slots bound.
    The constructor raises what Scheduler.submit raises, after having cancelled the requests already submitted.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[IndexedOutput] = asyncio.Queue()
        self._fan_in = FanIn(scheduler, requests, partial(self._put, asyncio.get_running_loop()))

    def _put(self, loop: asyncio.AbstractEventLoop, item: IndexedOutput) -> None:
        if not loop.is_closed():  # a server that was told twice to stop waits for nobody
            loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, OutputChunk]]]:
        while self._fan_in.unfinished:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            chunks = []
            for index, output in map(self._fan_in.receive, items):
                if isinstance(output, Exception):
                    raise api_error(output) from output
                chunks.append((index, output))
            yield chunks

    def cancel(self) -> None:
        """Give back the slots of answers that are not finished."""
        self._fan_in.cancel()
