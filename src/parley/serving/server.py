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
from parley.serving.connections import Connection, accept_connections
from parley.serving.limits import Limits

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
        limits: Limits,
        *,
        drain_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,  # uvicorn's log goes through the program's own handlers
            log_level="error",  # its warnings are about clients, who could fill the log with them
            access_log=False,
            http="h11",
            ws="none",
            timeout_graceful_shutdown=int(drain_seconds) + FLUSH_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        self._bound, self._scheduler, self._limits, self._on_ready = bound, scheduler, limits, on_ready
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
        await super().startup(sockets=[])  # without sockets uvicorn accepts no connections by itself
        self._bound.setblocking(False)
        self._bound.listen(self.config.backlog)
        self._accepting = asyncio.create_task(
            accept_connections(self._bound, self._new_connection, self.server_state.connections, self._limits)
        )
        self._on_ready()

    def _new_connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, limits=self._limits)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self._skip_drain:
            self._skip_drain = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        draining = asyncio.create_task(self._close_scheduler())
        await super().shutdown(sockets)
        draining.cancel()

    async def _close_scheduler(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._drain_seconds
        while not self._skip_drain and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._scheduler.close, drain=False)
