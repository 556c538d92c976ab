from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serving.conftest import Running

from parley.config import DEMO_MODEL
from parley.errors import UsageError
from parley.serving.address import bind, check_api_key, is_loopback
from parley.serving.loading import served_names


def test_loopback_is_known_by_its_address() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.1", "example.org", ""]))


def test_a_key_is_required_beyond_this_machine() -> None:
    check_api_key("127.0.0.1", None)
    check_api_key("0.0.0.0", "sesame")
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0 can be reached from elsewhere; give --api-key"):
        check_api_key("0.0.0.0", None)
    for useless in ("", " sesame", "sésame", "a\nb"):
        with pytest.raises(UsageError, match="printable ASCII"):
            check_api_key("127.0.0.1", useless)


def test_a_taken_port_and_a_wrong_host_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid port 1"):
        bind("no.such.host.invalid", 1)


def test_names_are_the_folders_and_the_bases() -> None:
    assert served_names(DEMO_MODEL, None) == {DEMO_MODEL: False}
    assert served_names("owner/model", None) == {"owner/model": False}


def test_a_run_named_as_its_base_does_not_hide_it(tmp_path: Path) -> None:
    folder, name = str(tmp_path), tmp_path.name
    assert served_names(folder, "owner/model") == {name: False, "owner/model": True}
    assert served_names(folder, folder) == {name: False, f"{name}-base": True}


@pytest.mark.parametrize("hurried", [False, True])
def test_answers_that_time_runs_out_for_are_ended_and_their_clients_told(
    serving: Callable[..., Running], tiny_llama_folder: Path, hurried: bool
) -> None:
    running = serving(tiny_llama_folder, max_num_seqs=1, max_model_len=2048, stop_ids=[], drain=60 if hurried else 0.5)
    name = next(iter(running.service.model.names))
    asked: Any = {
        "model": name,
        "messages": [{"role": "user", "content": "Ahoy!"}],
        "max_tokens": 2000,
        "temperature": 0,
    }
    streams = [running.client.chat.completions.create(**asked, stream=True) for _ in range(20)]
    running.server.handle_exit(signal.SIGINT, None)
    if hurried:
        running.server.handle_exit(signal.SIGINT, None)
    with pytest.raises(openai.APIError, match="stopped before the answer was finished"):
        list(streams[-1])
    deadline = time.monotonic() + 20
    while running.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(openai.APIConnectionError):
        running.client.models.list()
