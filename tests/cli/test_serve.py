"""`parley serve` as its own process: what it says, what it serves, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import openai
import pytest

from parley.training.run_folder import RunFolder

HELLO: Any = [{"role": "user", "content": "Ahoy!"}]


class Process:
    """A server, from its banner on."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "parley.cli.main", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.banner = ""
        assert self.process.stdout is not None
        while "-d '" not in self.banner:
            line = self.process.stdout.readline()
            assert line, self.process.stderr and self.process.stderr.read()
            self.banner += line
        found = re.search(r"at (http://\S+:(\d+)/v1)", self.banner)
        assert found
        self.port = int(found[2])
        self.client = openai.OpenAI(base_url=found[1], api_key="sesame", max_retries=0, timeout=60)

    def end(self, seconds: float = 30) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: object) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


def test_a_run_is_served_and_sigterm_lets_answers_end(run: RunFolder, serve: Callable[..., Process]) -> None:
    server = serve(run.path, "--api-key", "sesame", "--max-num-seqs", 2, "--max-model-len", 2048)
    assert "tuned and llama at http://127.0.0.1" in server.banner
    assert "2 requests at a time, 2048 tokens each" in server.banner
    assert "Bearer KEY" in server.banner
    assert "sesame" not in server.banner
    assert [model.id for model in server.client.models.list()] == ["tuned", "llama"]
    asked: Any = {"model": "llama", "messages": HELLO, "max_tokens": 300}
    whole = server.client.chat.completions.create(**asked).choices[0].message.content
    assert len(whole) > 200

    stream = iter(server.client.chat.completions.create(**asked, stream=True))
    said = "".join(next(stream).choices[0].delta.content or "" for _ in range(3))
    server.process.send_signal(signal.SIGTERM)
    deadline = monotonic() + 5
    while _reachable(server.port):
        assert monotonic() < deadline
    said += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == whole
    assert server.end() == (0, "")


def _reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_run_that_is_not_as_it_was_trained_is_not_served(
    run: RunFolder, parley: Callable[..., Any], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run.path, changed)
    template = changed / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("| trim", "| trim | upper"))
    ended = parley("serve", changed, "--port", 0)
    assert ended.code == 1
    said, trained, served, error = ended.err.splitlines()
    assert said.startswith("golden conversation 1 differs from token")
    stored = json.loads((changed / "golden.json").read_text())[0]["input_ids"]
    assert str(stored[int(said.split("token ")[1].split()[0])]) in trained
    assert served.startswith("  served:")
    assert "not the one the run was trained with" in error


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 can be reached from elsewhere; give --api-key"),
        (["--api-key", "a b\n"], 2, "--api-key: wanted printable ASCII"),
        (["--engine", "vllm"], 2, "vLLM is not installed"),
        (["--max-num-seqs", "0"], 2, "Invalid value for '--max-num-seqs'"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    parley: Callable[..., Any],
    tiny_llama_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    ended = parley("serve", tiny_llama_folder, *options)
    assert ended.code == code
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_what_cannot_be_loaded_ends_it(parley: Callable[..., Any], tmp_path: Path) -> None:
    ended = parley("serve", tmp_path, "--port", 0)
    assert ended.code == 1
    assert "has no config.json" in ended.err


def test_a_second_ctrl_c_ends_answers_at_once_and_tells_their_clients(
    tiny_llama_folder: Path, serve: Callable[..., Process]
) -> None:
    server = serve(tiny_llama_folder, "--max-num-seqs", 1, "--drain", 60)
    asked: Any = {"model": "llama", "messages": HELLO, "max_tokens": 2000, "temperature": 0, "stream": True}
    streams = [server.client.chat.completions.create(**asked) for _ in range(12)]
    server.process.send_signal(signal.SIGINT)
    sleep(0.5)
    server.process.send_signal(signal.SIGINT)
    assert server.end(seconds=15) == (0, "")
    with pytest.raises(openai.APIError, match="stopped before the answer was finished"):
        list(streams[-1])


def test_old_option_names_are_read_with_a_line_that_says_the_new(
    parley: Callable[..., Any], tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vllm"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    executed: list[list[str]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        executed.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execve)
    parley("serve", tiny_llama_folder, "--engine", "vllm", "--max-num-seqs", 3, "--max-model-len", 99)
    ended = parley("serve", tiny_llama_folder, "--engine", "vllm", "--slots", 3, "--length", 99, "--queue", 7)
    assert executed[0] == executed[1]
    assert ended.err.splitlines() == [
        f"parley: {old} is now {new}; the old name goes with the next version"
        for old, new in [("--slots", "--max-num-seqs"), ("--length", "--max-model-len"), ("--queue", "--max-queue")]
    ]
    assert "--slots" not in parley("serve", "--help").out


def test_a_missing_extra_is_one_line_with_the_pip_command(
    parley: Callable[..., Any], tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    ended = parley("serve", tiny_llama_folder, "--port", 0)
    assert ended.code == 2
    assert ended.err == ("parley: error: fastapi, prometheus_client: not installed; pip install 'parley-llm[serve]'\n")


def test_other_commands_need_no_extra() -> None:
    """In a process without the packages of [serve] and [bench], they still load what they work with."""
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'openai'): sys.modules[name] = None\n"
        "import parley.cli.chat, parley.cli.generate\n"
        "import parley.serving.loading, parley.serving.check_golden, parley.serving.vllm\n"
        "import parley.inference.generate, parley.bench.compare, parley.pipeline\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
