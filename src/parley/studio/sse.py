"""Server-sent events: what a stream looks like on the wire, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

HEARTBEAT_SECONDS = 15.0  # a comment, so that a connection whose browser is gone is noticed
RETRY_MS = 1000


@dataclass(frozen=True)
class Event:
    """One message. `id` comes back as Last-Event-ID when the browser reconnects."""

    data: str
    name: str = "message"
    id: str | None = None

    def encode(self) -> bytes:
        lines = [f"event: {self.name}", *(f"data: {line}" for line in self.data.split("\n"))]
        if self.id is not None:
            lines.insert(0, f"id: {self.id}")
        return ("\n".join(lines) + "\n\n").encode()


HEARTBEAT = b": still here\n\n"


def event_stream(request: Request, events: AsyncGenerator[Event | None]) -> StreamingResponse:
    """A response of `events`, until they or the studio end; None is a heartbeat."""
    closing: asyncio.Event = request.app.state.closing

    async def body() -> AsyncIterator[bytes]:
        yield f"retry: {RETRY_MS}\n\n".encode()
        closed = asyncio.create_task(closing.wait())
        following: asyncio.Future[Any] = closed
        try:
            while True:
                following = asyncio.ensure_future(anext(events))
                await asyncio.wait({following, closed}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                event = following.result()
                yield HEARTBEAT if event is None else event.encode()
        except StopAsyncIteration:
            return
        finally:
            # Nothing is awaited here: a browser that is gone has this task cancelled, again at each await.
            following.cancel()  # which ends `events` at its own await
            closed.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
