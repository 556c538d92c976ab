"""Connections that send nothing, half a header, or no HTTP: they are bounded in number and time, without a key."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from tests.serving.conftest import Running
from uvicorn.server import ServerState

from parley.serving import connections
from parley.serving.limits import Limits

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nX-Slow: "


@pytest.fixture(scope="module")
def impatient(serving: Callable[..., Running], tiny_llama_folder: Path) -> Running:
    return serving(tiny_llama_folder, header_timeout=0.5)


@pytest.fixture(scope="module")
def small(serving: Callable[..., Running], tiny_llama_folder: Path) -> Running:
    """It takes eight connections, and clients have all the time."""
    return serving(tiny_llama_folder, max_connections=8, header_timeout=60, api_key="sesame")


@pytest.fixture
def opened() -> Iterator[Callable[..., socket.socket]]:
    with contextlib.ExitStack() as stack:

        def connect(running: Running, data: bytes = b"") -> socket.socket:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20))
            client.sendall(data)
            return client

        yield connect


def read_to_end(client: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(2**16):
            received += part
    return received


def health(running: Running) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status


def body_of(response: bytes) -> dict[str, Any]:
    return json.loads(response.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("sent", [b"", b"P", HALF, b"GET /health HTTP/1.1\r\nHost: here\r\n"])
def test_headers_that_do_not_arrive_end_the_connection(
    impatient: Running, opened: Callable[..., socket.socket], sent: bytes
) -> None:
    response = read_to_end(opened(impatient, sent))
    assert response.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in response.lower()
    assert body_of(response)["error"]["code"] == "header_timeout"


def test_sending_a_byte_now_and_then_gains_no_time(impatient: Running, opened: Callable[..., socket.socket]) -> None:
    client = opened(impatient, HALF)
    client.settimeout(0.05)
    response, deadline = b"", time.monotonic() + 20
    while not response and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            client.sendall(b"x")
            response = client.recv(2**16)
    assert response.startswith(b"HTTP/1.1 408")


def test_the_headers_of_a_second_request_have_a_deadline_too(
    impatient: Running, opened: Callable[..., socket.socket]
) -> None:
    client = opened(impatient, b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
    first = client.recv(2**16)
    assert first.startswith(b"HTTP/1.1 200")
    client.sendall(b"GET /health HTTP/1.1\r\nHo")
    assert b"HTTP/1.1 408 Request Timeout\r\n" in read_to_end(client)


def test_a_body_that_nobody_reads_ends_the_connection(impatient: Running, opened: Callable[..., socket.socket]) -> None:
    client = opened(impatient, b"GET /health HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\nabc")
    assert read_to_end(client).startswith(b"HTTP/1.1 200")


def test_a_request_that_is_being_answered_has_no_such_deadline(
    serving: Callable[..., Running], tiny_llama_folder: Path
) -> None:
    running = serving(tiny_llama_folder, max_model_len=2048, stop_ids=[], header_timeout=0.05)
    name = next(iter(running.service.model.names))
    reply = running.client.completions.create(model=name, prompt="Ahoy", max_tokens=800, temperature=0)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 800


class Clock:
    """The loop of a connection, whose time is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Mock:
        self.timers.append((self.now + delay, callback))
        return Mock()

    def advance_to_timer(self) -> None:
        self.now, callback = self.timers.pop(0)
        callback()


@pytest.mark.parametrize("drained", [False, True])
def test_a_slow_reader_of_a_response_has_the_send_timeout(drained: bool) -> None:
    """A response is complete once it is in the transport's buffer; its client may still be reading."""
    clock, unread = Clock(), [9]
    transport = Mock()
    transport.get_write_buffer_size.side_effect = lambda: unread[0]
    transport.is_closing.return_value = False
    connection = connections.Connection(
        config=uvicorn.Config(Mock()),
        server_state=ServerState(),
        app_state={},
        _loop=clock,
        limits=Limits(max_open_requests=4, header_timeout=2, send_timeout=7),
    )
    connection.connection_made(transport)
    for seconds in (2, 4, 6):
        clock.advance_to_timer()
        assert clock.now == 100 + seconds
        transport.write.assert_not_called()
    unread[0] = 0 if drained else 9
    clock.advance_to_timer()
    assert clock.now == 108
    assert transport.write.call_args_list[0].args[0].startswith(b"HTTP/1.1 408 Request Timeout")
    transport.close.assert_called_once()
    assert clock.timers == []


def test_a_reader_that_has_read_all_has_the_header_timeout_alone() -> None:
    clock, transport = Clock(), Mock()
    transport.get_write_buffer_size.return_value = 0
    transport.is_closing.return_value = False
    limits = Limits(max_open_requests=4, header_timeout=2, send_timeout=7)
    connection = connections.Connection(
        config=uvicorn.Config(Mock()), server_state=ServerState(), app_state={}, _loop=clock, limits=limits
    )
    connection.connection_made(transport)
    clock.advance_to_timer()
    transport.close.assert_called_once()


def test_others_are_served_while_someone_opens_connections_without_end(
    small: Running, opened: Callable[..., socket.socket]
) -> None:
    """A new connection takes the place of the one that has waited longest for its headers."""
    for _ in range(8):
        held = [opened(small, HALF) for _ in range(16)]
        assert health(small) == 200
        assert len(small.server.server_state.connections) <= 8
    assert read_to_end(held[0]) == b""  # dropped without an answer


def test_requests_in_progress_are_not_dropped_for_new_connections(
    small: Running, opened: Callable[..., socket.socket]
) -> None:
    post = (
        b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer sesame\r\n"
        b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    held = [opened(small, post) for _ in range(8)]
    deadline = time.monotonic() + 20
    while sum(connection.waiting_since is None for connection in small.server.server_state.connections) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read_to_end(opened(small, HALF)) == b""
    held[0].close()
    while len(small.server.server_state.connections) == 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert health(small) == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nA: " + b"x" * 2**17 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["tls", "no-version", "length", "long-header", "no-host"],
)
def test_what_is_no_http_is_refused_in_openais_form(
    small: Running, opened: Callable[..., socket.socket], caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    client = opened(small)
    with contextlib.suppress(ConnectionError):
        client.sendall(garbage)
    response = read_to_end(client)
    if response or b"x" * 99 not in garbage:  # where data is left unread, the reset may overtake the response
        assert response.startswith(b"HTTP/1.1 400")
        assert body_of(response)["error"]["type"] == "invalid_request_error"
    assert caplog.records == []  # clients cannot fill the log
    assert health(small) == 200


def test_without_open_files_accepting_waits_and_the_log_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delays: list[float] = []
    errors = [errno.EMFILE] * 8 + [errno.ECONNABORTED]
    sleep = asyncio.sleep

    loops: list[asyncio.AbstractEventLoop] = []

    async def no_sleep(seconds: float) -> None:
        if asyncio.get_running_loop() not in loops:  # a server of another test, in its thread
            await sleep(seconds)
            return
        delays.append(seconds)
        await sleep(0)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loops.append(loop)
        ours, theirs = socket.socketpair()
        accepted: asyncio.Future[Any] = loop.create_future()

        async def sock_accept(listening: socket.socket) -> Any:
            if errors:
                raise OSError(errors.pop(0), "Too many open files")
            if not accepted.done():
                ours.setblocking(False)
                return ours, None
            return await loop.create_future()

        async def connect_accepted_socket(factory: Any, connection: socket.socket) -> None:
            accepted.set_result(connection)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        monkeypatch.setattr(loop, "connect_accepted_socket", connect_accepted_socket)
        task = asyncio.create_task(connections.accept_connections(ours, None, set(), Limits(8)))  # type: ignore[arg-type]
        assert await accepted is ours
        task.cancel()
        ours.close()
        theirs.close()

    monkeypatch.setattr(connections.asyncio, "sleep", no_sleep)
    asyncio.run(run())
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "no connection can be accepted: Too many open files" in caplog.text


@pytest.mark.parametrize(("soft", "expected"), [(1024, 288 + 256), (256, 192), (resource.RLIM_INFINITY, 288 + 256)])
def test_connections_leave_files_for_the_rest_of_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert Limits(max_open_requests=288).connection_limit() == expected
    assert Limits(max_open_requests=288, max_connections=5).connection_limit() == 5


def test_the_connection_that_has_waited_longest_is_dropped_first() -> None:
    class Open(list[Any]):
        discard = list.remove

    opened = Open(Mock(waiting_since=since) for since in (3.0, 1.0, None, 2.0))
    oldest, answering = opened[1], opened[2]
    assert connections._drop_longest_waiting(opened)  # type: ignore[arg-type]
    assert oldest.transport.abort.call_count == 1
    assert [each.waiting_since for each in opened] == [3.0, None, 2.0]
    assert not connections._drop_longest_waiting(Open([answering]))  # type: ignore[arg-type]
