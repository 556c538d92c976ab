"""The server's life cycle: listen, answer, and drain on a signal."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from parley.inference.scheduler import Scheduler

FLUSH_SECONDS = 5  # for clients to read the end of their responses


class Server(uvicorn.Server):
    """uvicorn's server on a bound socket, with an orderly end for the outputs of `scheduler`.

    SIGTERM or Ctrl-C stop accepting connections; open requests are finished. After `drain_seconds`, or at a second
    signal, unfinished outputs end with an error to their clients. A third signal does not wait for that.
    `on_ready` is called once the server listens.
    """

    def __init__(
        self,
        app: FastAPI,
        bound: socket.socket,
        scheduler: Scheduler,
        *,
        drain_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # uvicorn's log goes through the program's own handlers
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(drain_seconds) + FLUSH_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        self._bound, self._scheduler, self._on_ready = bound, scheduler, on_ready
        self._drain_seconds, self._skip_drain = drain_seconds, False

    def run_until_signal(self) -> None:
        # uvicorn raises the signal again after the shutdown; it is ignored, because the end is orderly.
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            asyncio.run(self.serve(sockets=[self._bound]))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self._skip_drain:
            self._skip_drain = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._close_scheduler())
        await super().shutdown(sockets)
        draining.cancel()

    async def _close_scheduler(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while not self._skip_drain and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._scheduler.close, drain=False)
