"""What stands between the network and the routes: the key, limits on bodies, readers and numbers, and the counting."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parley.serving.errors import ApiError, too_many
from parley.serving.metrics import Metrics

OPEN_TO_ALL = "/health"
CLOSE = {"Connection": "close"}  # what else the client sends is not read


@dataclass(frozen=True)
class Limits:
    """`open`: requests at a time, from their first byte to the last that is read of their reply.

    `body_bytes`, `body_seconds`: a request's size, and how long it may take to send. `stalled_seconds`: how long a
    client may read nothing of a reply that is ready before it is given up.
    """

    open: int
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30
    stalled_seconds: float = 60


class Guard:
    """An ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self._limits.stalled_seconds):
                await send(message)

        try:
            await self._admit(scope, receive, counting)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        costs = scope["method"] == "POST"
        self._open += costs
        try:
            await self._app(scope, _Body(receive, self._limits).receive, send)
        finally:
            self._open -= costs

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key is not None and scope["path"] != OPEN_TO_ALL:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                wrong = "the API key is wrong" if given else "no API key was sent"
                message = f"{wrong}; send the server's as Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and self._open >= self._limits.open:
            return too_many(f"{self._open} requests are open, as many as this server takes")
        return None


class _Body:
    """A request's body, received within its limits. A body that is too large is read away, so that the client sends
    all of it and then reads why it was refused; one that is far too large is not."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the client's going away
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._within_limits()
        except TimeoutError:
            self._whole = True
            seconds = self._limits.body_seconds
            late = f"the body did not come within {seconds:g} seconds"
            raise ApiError(408, late, code="body_timeout", headers=CLOSE) from None

    async def _within_limits(self) -> Message:
        most, body, size = self._limits.body_bytes, bytearray(), 0
        while not self._whole:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            size += len(message.get("body", b""))
            if size <= most:
                body += message.get("body", b"")
            self._whole = not message.get("more_body", False) or size > 16 * most
        if size > most:
            large = f"the body is larger than {most} bytes; send less"
            raise ApiError(413, large, code="body_too_large", headers=CLOSE)
        return {"type": "http.request", "body": bytes(body), "more_body": False}


class Gone(Exception):
    """The client went away."""


async def unless_gone(receive: Receive, work: asyncio.Task[None]) -> None:
    """Wait for `work`, to be cancelled as soon as the client goes away, which raises Gone.

    Only for requests whose body was received.
    """
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        work.result()
    finally:
        gone.cancel()
        work.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
