"""The server's life: a port, a decoder behind a scheduler, and an end in which what was begun is finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from parley.errors import UsageError
from parley.inference.scheduler import Scheduler

READING_SECONDS = 5  # for clients to read what was written to the last


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(host: str, api_key: str | None) -> None:
    """Raises UsageError where the server could be reached from elsewhere without a key, or the key is no use."""
    if api_key is None and not is_loopback(host):
        raise UsageError(f"--host {host} can be reached from elsewhere; give --api-key, or bind to 127.0.0.1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("--api-key: wanted printable ASCII without spaces around it, as it travels in a header")


def bind(host: str, port: int) -> socket.socket:
    """A socket on which nobody listens yet, so that a port that is taken is known before a model is loaded.

    `port` 0 is any that is free. Raises UsageError.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None
    return bound


class Server(uvicorn.Server):
    """uvicorn's server on a socket of ours, for the answers of `scheduler`; `ready` is called once it listens.

    SIGTERM or Ctrl-C stop it: no more connections, and what was asked is answered. After `drain_seconds`, or at a
    second signal, the answers that are left are ended, and their clients told so. A third does not wait for these.
    """

    def __init__(
        self,
        app: FastAPI,
        bound: socket.socket,
        scheduler: Scheduler,
        *,
        drain_seconds: float,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # warnings and errors go where the program's go
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(drain_seconds) + READING_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        self._bound, self._scheduler, self._ready = bound, scheduler, ready
        self._drain_seconds, self._hurried = drain_seconds, False

    def run_to_end(self) -> None:
        """Serve until a signal. uvicorn raises the signal again afterwards, which is let pass."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            asyncio.run(self.serve(sockets=[self._bound]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self._hurried:
            self._hurried = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while not self._hurried and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._scheduler.close, drain=False)
