"""The studio's server: uvicorn on a bound socket, until a signal ends it."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from parley.studio.app import create_app
from parley.studio.state import Studio

SHUTDOWN_SECONDS = 3  # for open responses
MAX_CONNECTIONS = 512


class Server(uvicorn.Server):
    """uvicorn's server that says when it listens."""

    def __init__(self, app: FastAPI, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_ready = app, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await asyncio.to_thread(self._on_ready)  # a browser may take its time

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.closing.set()
        await super().shutdown(sockets)


def serve(studio: Studio, bound: socket.socket, host: str, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve `studio` on the socket `bound`. Returns after Ctrl-C or SIGTERM; runs are not affected."""
    app = create_app(studio, host=host)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
    )
    # uvicorn raises the signal again after the shutdown; it is ignored, because the end is orderly.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(Server(app, config, on_ready).serve(sockets=[bound]))
    finally:
        for child in multiprocessing.active_children():  # a plan that is being counted must not delay the end
            child.terminate()
        for number, handler in previous.items():
            signal.signal(number, handler)
