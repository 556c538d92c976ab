"""Admission control in front of the routes: API key, limits on bodies, readers and open requests, request metrics."""

from __future__ import annotations

import asyncio
import hmac
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parley.serving.errors import ApiError, too_many_requests
from parley.serving.limits import Limits
from parley.serving.metrics import Metrics

PUBLIC_PATH = "/health"  # the one route without a key
CLOSE = {"Connection": "close"}  # the rest of the request is not read


class AdmissionMiddleware:
    """ASGI middleware that refuses requests without a key or beyond the limits, and counts all of them."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def timed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self._limits.send_timeout):
                await send(message)

        try:
            await self._admit(scope, receive, timed_send)
        finally:
            # Labels are routes, not paths: clients must not be able to create time series.
            route = scope["route"].path if "route" in scope else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        counted = scope["method"] == "POST"  # reads stay possible while all generation requests are taken
        self._open_requests += counted
        try:
            await self._app(scope, _BodyReader(receive, self._limits).receive, send)
        finally:
            self._open_requests -= counted

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key is not None and scope["path"] != PUBLIC_PATH:
            sent_key = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent_key, self._key):
                problem = "the API key is wrong" if sent_key else "no API key was sent"
                message = f"{problem}; send the server's as Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and self._open_requests >= self._limits.max_open_requests:
            return too_many_requests(f"{self._open_requests} requests are open, the most this server takes")
        return None


class _BodyReader:
    """Receives a request body within the limits.

    A body over the limit is read to its end and discarded, because most clients only read a response after having
    sent everything. Beyond 16 times the limit the connection is closed.
    """

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # the only message left is the disconnect
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._read_body()
        except TimeoutError:
            self._complete = True
            message = f"the body did not arrive within {self._limits.body_timeout:g} seconds"
            raise ApiError(408, message, code="body_timeout", headers=CLOSE) from None

    async def _read_body(self) -> Message:
        limit, body, size = self._limits.max_body_bytes, bytearray(), 0
        while not self._complete:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            size += len(message.get("body", b""))
            if size <= limit:
                body += message.get("body", b"")
            self._complete = not message.get("more_body", False) or size > 16 * limit
        if size > limit:
            message_text = f"the body is larger than {limit} bytes; send less"
            raise ApiError(413, message_text, code="body_too_large", headers=CLOSE)
        return {"type": "http.request", "body": bytes(body), "more_body": False}


async def run_until_disconnect(receive: Receive, work: asyncio.Task[None]) -> None:
    """Wait for `work`; cancel it and raise ClientDisconnect as soon as the client goes away.

    Only for requests whose body was received: `receive` must yield nothing but the disconnect.
    """
    disconnect = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        work.result()
    finally:
        disconnect.cancel()
        work.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
