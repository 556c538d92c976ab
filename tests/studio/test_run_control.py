"""Runs that are stopped and discarded: stand-ins for `parley train` that hold the run's lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient

from parley.errors import RunError
from parley.studio import run_control
from parley.studio.state import Studio

RUN = """
import pathlib, signal, sys
from parley.training.run_lock import RunLock
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append("term"))
lock = RunLock(pathlib.Path(sys.argv[1]))
print("runs", flush=True)
while len(signals) < int(sys.argv[2]):
    signal.sigtimedwait([], 0.05)
lock.release()
"""


@pytest.fixture
def start(studio: Studio) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a run that ends at the `count`th signal."""
    started = []

    def start_run(count: int) -> subprocess.Popen[str]:
        folder = studio.root / "mine"
        folder.mkdir()
        (folder / "run.yaml").write_text("model: parley-demo\n")
        process = subprocess.Popen([sys.executable, "-c", RUN, folder, str(count)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        return process

    yield start_run
    for process in started:
        process.kill()
        process.communicate()


def act(client: TestClient, action: str) -> int:
    return client.post("/runs/mine", data={"action": action}).status_code


def test_a_run_is_asked_to_stop_and_keeps_its_folder(
    client: TestClient, studio: Studio, start: Callable[[int], subprocess.Popen[str]]
) -> None:
    process = start(1)
    assert act(client, "resume") == 400, "it runs"
    assert act(client, "stop") == 200
    assert process.wait(30) == 0
    assert (studio.root / "mine" / "run.yaml").is_file()
    with pytest.raises(RunError, match="does not run any more"):
        run_control.stop(studio.root / "mine")


@pytest.mark.parametrize("count", [1, 2, 99])
def test_a_run_is_discarded_whatever_it_does_with_signals(
    client: TestClient,
    studio: Studio,
    start: Callable[[int], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(run_control, "PATIENCE", 0.5)
    process = start(count)
    assert act(client, "discard") == 204
    process.wait(30)  # whose code psutil has taken
    assert not (studio.root / "mine").exists()
    assert act(client, "discard") == 400
