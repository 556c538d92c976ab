"""Connections with bounds: their number, and the time in which a request's headers must arrive.

uvicorn bounds neither: its keep-alive timeout starts after a response, and `limit_concurrency` answers 503 only after
the headers. So a client that sends half a header keeps a connection for good (a "slowloris" attack).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from parley.serving.errors import ApiError
from parley.serving.limits import Limits

logger = logging.getLogger(__name__)

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
MIN_BACKOFF, MAX_BACKOFF = 0.05, 1.0  # seconds


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline for the headers of each request."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._deadline_timer: asyncio.TimerHandle | None = None
        self.waiting_since: float | None = None
        """When it began to wait for the headers of a request; None while a request is being answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering():  # a pipelined request may have begun
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP in OpenAI's form."""
        self._refuse(ApiError(400, msg))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._stop_waiting()
        self.waiting_since = self.loop.time()
        self._deadline_timer = self.loop.call_later(self._limits.header_timeout, self._on_deadline)

    def _stop_waiting(self) -> None:
        self.waiting_since = None
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None

    def _on_deadline(self) -> None:
        """No complete headers in time. A client that only reads slowly has `send_timeout`."""
        waited = self.loop.time() - (self.waiting_since or 0)
        if self.transport.get_write_buffer_size() and waited < self._limits.send_timeout:
            self._deadline_timer = self.loop.call_later(self._limits.header_timeout, self._on_deadline)
        elif self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            self.transport.abort()  # closed already, or in the middle of a body that is not read
        else:
            seconds = f"{self._limits.header_timeout:g} seconds"
            self._refuse(ApiError(408, f"the headers did not arrive within {seconds}", code="header_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Send an error outside of a request, and close."""
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=error.status_code, headers=headers, reason=HTTPStatus(error.status_code).phrase),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def accept_connections(
    listening: socket.socket, new_connection: Callable[[], Connection], connections: set[Any], limits: Limits
) -> None:
    """Accept connections from `listening` until cancelled; `connections` are the open ones.

    At the limit a new connection takes the place of the one that has waited longest for a request; where all are
    being answered, the new one is closed. asyncio's own loop, when out of files, logs a traceback for each connection
    of the backlog and tries all again; this one waits, with a growing delay, and logs one line a minute.
    """
    loop = asyncio.get_running_loop()
    max_connections = limits.connection_limit()
    backoff, last_logged = MIN_BACKOFF, -60.0
    while True:
        try:
            accepted, _ = await loop.sock_accept(listening)
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                if loop.time() - last_logged >= 60:
                    logger.error("no connection can be accepted: %s; raise the limit on open files", error.strerror)
                    last_logged = loop.time()
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
            continue  # others concern one connection, as ECONNABORTED does
        backoff = MIN_BACKOFF
        if len(connections) >= max_connections and not _drop_longest_waiting(connections):
            accepted.close()
            continue
        try:
            await loop.connect_accepted_socket(new_connection, accepted)
        except OSError:  # the client is gone already
            accepted.close()


def _drop_longest_waiting(connections: set[Connection]) -> bool:
    waiting = {
        connection: connection.waiting_since for connection in connections if connection.waiting_since is not None
    }
    if not waiting:
        return False
    connection = min(waiting, key=lambda candidate: waiting[candidate])
    connection.transport.abort()
    connections.discard(connection)
    return True
