"""From the scheduler's thread to the server's event loop: the answers to one HTTP request, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from parley.inference.scheduler import Piece, Request, Scheduler, Ticket
from parley.serving.errors import api_error


class Answers:
    """Several answers under way, to be iterated once: what was written since the last look, as (which, piece).

    A reader that looks seldom gets more at a time and so keeps up. ApiError ends all answers.

    What waits here for a slow reader is at most the answers themselves, whose length the decoder's slots bound.
    `submit` raises what Scheduler.submit raises, after having cancelled those already taken.
    """

    def __init__(self, number: int) -> None:
        self._open = number
        self._inbox: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    @classmethod
    def submit(cls, scheduler: Scheduler, requests: Sequence[Request]) -> Answers:
        answers = cls(len(requests))
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(requests):
                answers._tickets.append(scheduler.submit(request, answers._deliver(loop, index)))
        except BaseException:
            answers.cancel()
            raise
        return answers

    def _deliver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Piece | Exception], None]:
        def deliver(piece: Piece | Exception) -> None:
            if not loop.is_closed():  # a server that was told twice to stop waits for nobody
                loop.call_soon_threadsafe(partial(self._inbox.put_nowait, (index, piece)))

        return deliver

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        while self._open:
            told = [await self._inbox.get()]
            while not self._inbox.empty():
                told.append(self._inbox.get_nowait())
            pieces = []
            for index, piece in told:
                if isinstance(piece, Exception):
                    raise api_error(piece) from piece
                self._open -= piece.finish is not None
                pieces.append((index, piece))
            yield pieces

    def cancel(self) -> None:
        """Give back the slots of answers that are not finished."""
        for ticket in self._tickets:
            ticket.cancel()
