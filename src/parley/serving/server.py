"""The server's life: a port, a decoder behind a scheduler, and an end in which what was begun is finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn
from fastapi import FastAPI

from parley.errors import UsageError


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
    """uvicorn's server on a socket of ours; `ready` is called once it listens.

    SIGTERM and Ctrl-C stop it: no more connections, then up to `drain_seconds` for the replies under way. A second
    Ctrl-C does not wait.
    """

    def __init__(
        self, app: FastAPI, bound: socket.socket, *, drain_seconds: float, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # warnings and errors go where the program's go
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=max(int(drain_seconds), 1),
            server_header=False,
        )
        super().__init__(config)
        self._bound, self._ready = bound, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def run_to_end(self) -> None:
        """Serve until a signal or `should_exit`. uvicorn raises the signal again afterwards, which is let pass."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            asyncio.run(self.serve(sockets=[self._bound]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
