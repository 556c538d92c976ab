"""The queue: its order, one run a device, what survives the studio, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from parley.errors import ParleyError, RunError, UsageError
from parley.studio import app
from parley.studio import queue as queue_module
from parley.studio.queue import Job, Queue
from parley.studio.state import Studio
from parley.training.run_lock import RunLock

# Stands in for `parley`: makes the run's folder, as far as its settings say, and waits to be ended.
PROGRAM = """
import os, pathlib, sys, time
settings = pathlib.Path(sys.argv[-1]).read_text() if sys.argv[1] == "train" and sys.argv[2] != "--resume" else ""
print("started on", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if "fails" in settings:
    sys.exit("it failed")
if settings:
    output = pathlib.Path(next(l for l in settings.splitlines() if l.startswith("output: ")).removeprefix("output: "))
    output.mkdir(parents=True)
    (output / "run.yaml").write_text(settings)
time.sleep(60)
"""
SETTINGS = "model: parley-demo\ndata: parley-demo-pirate\n"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setattr(queue_module, "devices", lambda: ("cpu",))
    (tmp_path / ".studio").mkdir()
    made = Queue(tmp_path, tmp_path / ".studio", (sys.executable, "-c", PROGRAM))
    yield made
    for job in made.jobs():
        if (process := job.process()) is not None:
            process.kill()


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def states(queue: Queue) -> list[tuple[str, str]]:
    return [(job.run_id, job.state) for job in queue.jobs()]


def end(queue: Queue, run_id: str) -> None:
    wait_for((queue.root / run_id / "run.yaml").is_file)
    process = next(job for job in queue.jobs() if job.run_id == run_id).process()
    assert process is not None
    process.kill()
    process.wait(5)


def test_one_run_at_a_time_in_order(queue: Queue) -> None:
    assert [queue.add(SETTINGS, name) for name in ("a", "b", "a")] == ["a", "b", "a-2"]
    assert states(queue) == [("a", "running"), ("b", "waiting"), ("a-2", "waiting")]
    queue.advance()
    assert states(queue) == [("a", "running"), ("b", "waiting"), ("a-2", "waiting")]
    end(queue, "a")
    queue.advance()
    assert states(queue) == [("b", "running"), ("a-2", "waiting")]


@pytest.mark.parametrize(
    ("files", "visible", "found"),
    [
        ([], None, ("cpu",)),
        (["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"], None, ("0", "1")),
        (["nvidia0", "nvidia1", "nvidia2"], "2,0", ("2", "0")),
        (["nvidia0"], "", ("cpu",)),
    ],
)
def test_devices_are_counted_without_torch(
    monkeypatch: pytest.MonkeyPatch, files: list[str], visible: str | None, found: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / name for name in files])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert queue_module.devices() == found


def test_each_gpu_gets_a_run_and_sees_itself_alone(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "devices", lambda: ("0", "3"))
    for name in ("a", "b", "c"):
        queue.add(SETTINGS, name)
    assert states(queue) == [("a", "running"), ("b", "running"), ("c", "waiting")]
    wait_for(lambda: all("started" in queue.log(job.id) for job in queue.jobs()[:2]))
    assert [queue.log(job.id).strip() for job in queue.jobs()[:2]] == ["started on 0", "started on 3"]
    queue.add("model: {name: parley-demo, device: cpu}", "d")  # it needs no card
    assert states(queue)[-1] == ("d", "running")


def test_a_run_of_a_terminal_has_its_card_to_itself(queue: Queue) -> None:
    folder = queue.root / "by-hand"
    folder.mkdir()
    lock = RunLock(folder)
    queue.add(SETTINGS, "a")
    assert states(queue) == [("a", "waiting")]
    lock.release()
    queue.advance()
    assert states(queue) == [("a", "running")]


def test_waiting_runs_are_moved_and_cancelled(queue: Queue) -> None:
    for name in ("a", "b", "c", "d"):
        queue.add(SETTINGS, name)
    ids = {job.run_id: job.id for job in queue.jobs()}
    queue.move(ids["d"], -1)
    queue.move(ids["b"], -1)  # it is the first already
    assert [name for name, _ in states(queue)] == ["a", "b", "d", "c"]
    queue.cancel(ids["b"])
    assert [name for name, _ in states(queue)] == ["a", "d", "c"]
    assert not (queue.jobs_folder / f"{ids['b']}.yaml").exists()
    with pytest.raises(RunError, match="stop it on its page"):
        queue.cancel(ids["a"])
    with pytest.raises(RunError, match="reload"):
        queue.cancel(ids["b"])
    with pytest.raises(RunError, match="reload"):
        queue.move(ids["a"], 1)


def test_another_studio_finds_the_queue_and_takes_over(queue: Queue) -> None:
    for name in ("a", "b"):
        queue.add(SETTINGS, name)
    wait_for((queue.root / "a" / "run.yaml").is_file)
    other = Queue(queue.root, queue.folder, queue.program)
    other.advance()
    assert states(other) == [("a", "running"), ("b", "waiting")]
    end(queue, "a")
    other.advance()
    assert states(other) == [("b", "running")]


def test_a_run_is_no_child_that_the_studios_signals_reach(queue: Queue) -> None:
    queue.add(SETTINGS, "a")
    process = queue.jobs()[0].process()
    assert process is not None
    assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_a_pid_that_another_process_has_now_is_not_the_run(queue: Queue) -> None:
    started = psutil.Process().create_time()
    assert Job("1", "a", [], "running", "cpu", os.getpid(), started).is_alive
    assert not Job("1", "a", [], "running", "cpu", os.getpid(), started - 100).is_alive


def test_a_run_that_fails_before_it_has_a_folder_keeps_its_output(queue: Queue) -> None:
    queue.add(SETTINGS + "generation: {stop: [fails]}", "a")
    wait_for(lambda: (queue.advance(), states(queue) == [("a", "failed")])[1])
    job = queue.jobs()[0]
    assert "it failed" in queue.log(job.id)
    assert job.code == 1
    queue.cancel(job.id)
    assert queue.jobs() == []


def test_resuming_is_a_job_once(queue: Queue) -> None:
    queue.add(SETTINGS, "a")
    queue.resume("a")  # the process of the run that stopped has not ended yet
    assert states(queue) == [("a", "running"), ("a", "waiting")]
    assert queue.jobs()[1].arguments == ["train", "--resume", str(queue.root / "a")]
    with pytest.raises(RunError, match="already"):
        queue.resume("a")


def test_a_run_that_is_written_is_not_resumed(queue: Queue) -> None:
    (queue.root / "a").mkdir()
    lock = RunLock(queue.root / "a")
    with pytest.raises(RunError, match="runs"):
        queue.resume("a")
    lock.release()
    assert queue.jobs() == []


@pytest.mark.parametrize(
    "settings",
    ["[1]", "a: [", "model: {nmae: x}", "training: {max_steps: -7.5}", "!!python/object/apply:os.system [ls]", ""],
)
def test_wrong_settings_are_refused_in_one_line_and_queue_nothing(queue: Queue, settings: str) -> None:
    with pytest.raises(UsageError) as refusal:
        queue.add(settings)
    assert "\n" not in str(refusal.value)
    assert queue.jobs() == []


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("../../etc", "etc"),
        ("a b/c", "a-b-c"),
        ("海盗", "海盗"),
        ("..", "run"),
        ("x" * 300, "x" * 80),
        (".studio", "studio"),
    ],
)
def test_a_name_is_a_folder_below_the_root(queue: Queue, name: str, run_id: str) -> None:
    assert queue.add(SETTINGS, name) == run_id


def test_the_output_of_the_settings_is_not_followed(queue: Queue, tmp_path: Path) -> None:
    queue.add(SETTINGS + f"output: {tmp_path.parent}/elsewhere\n", "a")
    wait_for((queue.root / "a" / "run.yaml").is_file)
    assert not (tmp_path.parent / "elsewhere").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '[{"id": 1}]', json.dumps([{"id": "1", "strange": 2}])])
def test_a_broken_queue_is_said_and_not_overwritten(queue: Queue, content: str) -> None:
    queue.file.write_text(content)
    with pytest.raises(ParleyError, match="is broken"):
        queue.add(SETTINGS, "a")
    assert queue.file.read_text() == content
    queue.file.unlink()


def test_a_broken_queue_is_logged_once(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "QUEUE_SECONDS", 0.0)
    looks = []
    states = iter([*["is broken"] * 3, "", *["is broken"] * 2, *["cannot be written"] * 2])

    def advance() -> int:
        looks.append(state := next(states, "ended"))
        if state == "ended":
            raise AssertionError(state)
        if state:
            raise RunError(f"queue.json: {state}")
        return 0

    monkeypatch.setattr(studio.queue, "advance", advance)
    with pytest.raises(AssertionError, match="ended"):
        asyncio.run(app._watch_queue(studio))
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [f"queue.json: {state}" for state in ("is broken", "is broken", "cannot be written")]
