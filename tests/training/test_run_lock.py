"""One run folder has one writer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parley.config import RunConfig
from parley.errors import RunError
from parley.training.run_folder import RunFolder
from parley.training.run_lock import LOCK, Owner, RunLock, is_locked

HOLD = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "host": sys.argv[2], "boot": ""}, file)
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(RunError, match=f"is being written by process {os.getpid()} on {Owner.this_process().host}"):
        RunLock(tmp_path)
    lock.release()
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_the_lock_of_a_process_that_was_killed_is_taken_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = Owner.this_process().host
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / LOCK), host], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"is being written by process {holder.pid} on {host}"):
        RunLock(tmp_path)
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(RunError, match="another process is training into it"):
        RunFolder.create(RunConfig.create({"output": str(tmp_path)}))
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    assert f"the lock of process {holder.pid} on {host} is taken over" in caplog.text
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


def test_the_lock_of_another_machine_is_explained_and_kept(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot": "another"}))
    with pytest.raises(RunError, match=rf"process 7 on elsewhere, another machine.*remove {tmp_path / LOCK}"):
        RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 7
    assert not is_locked(tmp_path)  # nobody holds the file open: the attempt has let it go


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 1, "boot": 2}'])
def test_a_lock_that_its_writer_did_not_finish_is_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    RunLock(tmp_path).release()


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic"):
        RunLock(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_holds_only_a_dead_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    folder = RunFolder.create(RunConfig.create({"output": str(tmp_path)}))
    assert (tmp_path / "run.yaml").is_file()
    folder.unlock()
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_file_system_the_process_of_the_file_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = RunLock(tmp_path)
    assert "this file system has no locks" in caplog.text
    assert is_locked(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    (tmp_path / LOCK).write_text(json.dumps({**json.loads((tmp_path / LOCK).read_text()), "pid": ended.pid}))
    assert not is_locked(tmp_path)
    lock.release()


def test_a_look_at_the_lock_of_another_process_does_not_end_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`parley runs` holds a shared lock for a moment."""
    flock, tries = fcntl.flock, 0

    def held_for_a_moment(descriptor: int, operation: int) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise BlockingIOError
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", held_for_a_moment)
    RunLock(tmp_path).release()
    assert tries == 3
