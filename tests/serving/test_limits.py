"""Clients that send too much, ask too much, read too slowly or go away: others do not notice."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serving.conftest import Running
from tests.serving.test_errors import post, refused

HELLO: Any = [{"role": "user", "content": "Hello!"}]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


def long_answer(running: Running, **more: Any) -> bytes:
    """A request whose answer takes the model a while."""
    name = next(iter(running.service.model.names))
    body = json.dumps({"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 1900, **more}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=20)


def until_active(running: Running, number: int) -> None:
    deadline = time.monotonic() + 20
    while running.scheduler.counts.active < number:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_away_frees_its_slots(endless: Running, stream: bool, n: int) -> None:
    endless.until_idle()
    before = endless.scheduler.counts.tokens
    with connect(endless) as gone:
        gone.sendall(long_answer(endless, stream=stream, n=n))
        until_active(endless, n)
        if stream:
            assert gone.recv(4096).startswith(b"HTTP/1.1 200")
    endless.until_idle()
    assert endless.scheduler.counts.tokens - before < n * 1900 // 2


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(endless: Running) -> None:
    endless.until_idle()
    with connect(endless) as holding:
        holding.sendall(long_answer(endless, n=4))
        until_active(endless, 4)
        with connect(endless) as waiting:
            waiting.sendall(long_answer(endless))
            deadline = time.monotonic() + 20
            while endless.scheduler.counts.waiting < 1 and time.monotonic() < deadline:
                time.sleep(0.002)
            assert endless.scheduler.counts.waiting == 1
        while endless.scheduler.counts.waiting and time.monotonic() < deadline:
            time.sleep(0.002)
        assert endless.scheduler.counts.waiting == 0
    endless.until_idle()


def test_a_full_queue_is_told_with_when_to_try_again(endless: Running) -> None:
    """Four slots, four that wait: one request of 4 answers holds the slots, one of 5 does not fit the queue."""
    endless.until_idle()
    name = next(iter(endless.service.model.names))
    with connect(endless) as holding:
        holding.sendall(long_answer(endless, n=4))
        until_active(endless, 4)
        with pytest.raises(openai.RateLimitError, match="all 4 slots are taken and 4 requests wait") as told:
            endless.client.chat.completions.create(model=name, messages=HELLO, n=5)
        assert told.value.response.headers["retry-after"] == "1"
        assert told.value.code == "queue_full"
        assert endless.scheduler.counts.waiting == 0  # none of the five was left there
    endless.until_idle()


def test_only_so_many_requests_are_open(endless: Running) -> None:
    endless.until_idle()
    name = next(iter(endless.service.model.names))
    idle = [connect(endless) for _ in range(8)]  # slots and queue together
    for each in idle:
        each.sendall(HEAD + b"Content-Length: 9\r\n\r\n")
    time.sleep(0.2)
    with pytest.raises(openai.RateLimitError, match="8 requests are open"):
        endless.client.chat.completions.create(model=name, messages=HELLO)
    assert endless.client.models.list().data  # what costs nothing is told all the same
    for each in idle:
        each.close()
    time.sleep(0.2)
    assert endless.client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).choices


def test_bodies_have_a_size_and_a_time(endless: Running) -> None:
    error = refused(endless, b"x" * (2**20 + 1))
    assert (error["status"], error["code"]) == (413, "body_too_large")
    error = refused(endless, {"model": "x", "messages": HELLO, "user": "x" * 2**21})
    assert error["status"] == 413
    assert post(endless, {"model": "x", "messages": HELLO, "user": "x" * 2**19})[0] == 404
    with connect(endless) as slow:
        slow.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        told = b"".join(iter(lambda: slow.recv(4096), b""))
    assert told.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in told


def test_a_body_without_end_is_cut_off(endless: Running) -> None:
    with connect(endless) as flood:
        flood.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**30:
                flood.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
                sent += 2**16
    assert sent < 2**26


def test_a_slow_reader_holds_up_nobody_and_is_given_up(endless: Running) -> None:
    """It asks for megabytes of log-probabilities and reads none of them."""
    endless.until_idle()
    name = next(iter(endless.service.model.names))
    ask = {"model": name, "messages": HELLO, "max_tokens": 16, "temperature": 0}
    expected = endless.client.chat.completions.create(**ask).choices[0].message.content  # type: ignore[call-overload]
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", endless.port))
    slow.settimeout(20)
    slow.sendall(long_answer(endless, stream=True, n=3, logprobs=True, top_logprobs=20))
    until_active(endless, 3)
    for _ in range(5):
        assert endless.client.chat.completions.create(**ask).choices[0].message.content == expected  # type: ignore[call-overload]
    endless.until_idle(60)  # all is written, though nothing was read
    time.sleep(1.5)  # the server gives it up; what was on its way can still be read
    received = b""
    with contextlib.suppress(ConnectionError):
        while some := slow.recv(2**16):
            received += some
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received
    slow.close()
    assert endless.client.chat.completions.create(**ask).choices[0].message.content == expected  # type: ignore[call-overload]


def test_sixty_four_clients_get_the_answers_they_would_get_alone(tuned: Running) -> None:
    """For two seconds, with a queue between them and four slots; streamed and whole, greedy and drawn."""
    questions = ["Hello!", "What is the opposite of hot?", "What colour is the sky?", "Count to five.", "Who are you?"]
    asked = [
        {
            "model": name,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "seed": 7,
            "max_tokens": 24,
        }
        for name in ("pirate", "parley-demo")
        for question in questions
        for temperature in (0, 1.0)
    ]
    expected = [tuned.client.chat.completions.create(**each).choices[0].message.content for each in asked]  # type: ignore[call-overload]
    deadline = time.monotonic() + 2

    def client_of(number: int) -> list[tuple[int, str | None]]:
        got = []
        with tuned.client as client:
            turn = number
            while not got or time.monotonic() < deadline:
                turn = (turn + 1) % len(asked)
                if number % 2:
                    said = client.chat.completions.create(**asked[turn]).choices[0].message.content  # type: ignore[call-overload]
                else:
                    chunks = client.chat.completions.create(**asked[turn], stream=True)  # type: ignore[call-overload]
                    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                got.append((turn, said))
        return got

    with ThreadPoolExecutor(64) as clients:
        answers = [each for got in clients.map(client_of, range(64)) for each in got]
    assert len(answers) >= 64
    wrong = [(asked[turn], said, expected[turn]) for turn, said in answers if said != expected[turn]]
    assert wrong == []
    tuned.until_idle()


def test_metrics_and_health_tell_what_happens(endless: Running) -> None:
    def metrics() -> dict[tuple[str, str], float]:
        connection = http.client.HTTPConnection("127.0.0.1", endless.port, timeout=20)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return {
            (
                sample.name,
                " ".join(sample.labels[label] for label in ("route", "status") if label in sample.labels),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    endless.until_idle()
    before = metrics()
    name = next(iter(endless.service.model.names))
    endless.client.chat.completions.create(model=name, messages=HELLO, max_tokens=5, temperature=0)
    refused(endless, b"{")
    with connect(endless) as holding:
        holding.sendall(long_answer(endless, n=4))
        until_active(endless, 4)
        assert metrics()["parley_active_slots", ""] == 4
    endless.until_idle()
    after = metrics()

    def rose(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0)

    route = "/v1/chat/completions"
    assert rose("parley_requests_total", f"{route} 200") == 1
    assert rose("parley_requests_total", f"{route} 400") == 1
    assert rose("parley_request_seconds_count", route) == 3
    assert rose("parley_generated_tokens_total") >= 5
    assert rose("parley_prompt_tokens_total") > 0
    assert after["parley_active_slots", ""] == after["parley_waiting_requests", ""] == 0
    assert rose("parley_first_token_seconds_count") >= 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_decoder_that_fails_is_told_and_starts_anew_where_it_can(
    serving: Any, tiny_llama_folder: Any, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    running = serving(tiny_llama_folder, max_num_seqs=2, max_model_len=256, stop_ids=[])
    name = next(iter(running.service.model.names))
    stream = running.client.chat.completions.create(
        model=name, messages=HELLO, max_tokens=240, temperature=0, stream=True
    )
    next(iter(stream))
    decoder = running.scheduler._decoder

    def fail() -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "decode", fail)
        if lost:  # as a device that is gone
            patch.setattr(decoder, "reset", fail)
        with pytest.raises(openai.APIError, match="the decoder failed"):
            list(stream)
    if lost:
        with pytest.raises(openai.InternalServerError, match="the decoder failed earlier"):
            running.client.chat.completions.create(model=name, messages=HELLO)
    else:
        answer = running.client.chat.completions.create(model=name, messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().status == (503 if lost else 200)
    connection.close()
