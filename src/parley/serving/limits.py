"""Bounds on what clients can hold of the server. Times are in seconds."""

from __future__ import annotations

import resource
from dataclasses import dataclass

SPARE_CONNECTIONS = 256  # beyond open requests: idle clients, health checks, metrics


@dataclass(frozen=True)
class Limits:
    """Attributes:
    max_open_requests: POST requests at a time, from their first byte to the last byte read of their response.
    max_body_bytes: size of a request body.
    body_timeout: time in which the whole body must arrive.
    header_timeout: time in which the headers of a request must arrive, from the connection or the response before.
    send_timeout: time for which a client may read nothing of a response that is ready.
    max_connections: connections at a time; None derives it from `max_open_requests` and the limit on open files.
    """

    max_open_requests: int
    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30
    header_timeout: float = 10
    send_timeout: float = 60
    max_connections: int | None = None

    def connection_limit(self) -> int:
        """Connections at a time. A quarter of the process's open files stays free for everything else."""
        if self.max_connections is not None:
            return self.max_connections
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.max_open_requests + SPARE_CONNECTIONS
        return wanted if soft_limit == resource.RLIM_INFINITY else max(1, min(wanted, soft_limit * 3 // 4))
