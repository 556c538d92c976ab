"""`parley studio`: what it prints, and what it refuses before it listens."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from parley.cli import terminal
from parley.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["studio", *arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.com"])
def test_other_machines_are_let_in_only_when_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    line = refused(capsys, str(tmp_path / "runs"), "--host", host)
    assert "ssh -L" in line
    assert "--expose" in line
    assert not (tmp_path / "runs").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "find_spec", lambda module: None if module == "babel" else object())
    assert "babel: not installed; pip install 'parley-llm[studio]'" in refused(capsys, str(tmp_path))


def test_a_port_in_use_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(capsys, str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert "choose another --host or --port" in line


def test_an_allowed_folder_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, str(tmp_path), "--allow", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_its_address_and_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "parley", "studio", str(tmp_path / "runs"), "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]  # communicate() loses what a readline has buffered
    found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)", lines[0])
    assert found is not None
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(found[1])
    assert urllib.request.urlopen(found[0]).status == 200
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert str(tmp_path) in lines[2]  # the folders that pages may open
    assert (output, errors) == ("", "")
