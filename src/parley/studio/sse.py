"""Server-sent events: what a stream looks like on the wire, and when it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

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


def event_stream(events: AsyncIterator[Event | None]) -> StreamingResponse:
    """A response of `events`; None is a heartbeat."""

    async def body() -> AsyncIterator[bytes]:
        yield f"retry: {RETRY_MS}\n\n".encode()
        async for event in events:
            yield HEARTBEAT if event is None else event.encode()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
