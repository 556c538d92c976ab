"""The server's address: a bound socket, and whether an API key is required there."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from parley.errors import UsageError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_api_key(host: str, api_key: str | None) -> None:
    """Raises UsageError for a host that others can reach without a key, and for a key that no header can hold."""
    if api_key is None and not is_loopback(host):
        raise UsageError(f"--host {host} can be reached from elsewhere; give --api-key, or bind to 127.0.0.1")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("--api-key: wanted printable ASCII without spaces around it, as it travels in a header")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is found before a model is loaded.

    `port` 0 is any that is free. Raises UsageError.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name that can be encoded as IDNA
        if bound is not None:
            bound.close()
        reason = error.strerror if isinstance(error, OSError) else "no such address"
        raise UsageError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None
    return bound
