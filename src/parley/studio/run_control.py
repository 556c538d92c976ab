"""Stopping a run that is a process of its own, and removing what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from parley.errors import RunError
from parley.training.run_lock import LOCK, Owner, is_locked, is_locked_elsewhere

PATIENCE = 5.0  # seconds that a process is given to end after each signal


def owner_process(path: Path) -> psutil.Process | None:
    """The process that writes into the run in `path`; None where there is none on this machine.

    A lock file may be a copy, or its pid that of another container: only a process that has the file open is meant.
    """
    owner = Owner.read(path / LOCK)
    if owner is None or not owner.is_local or not is_locked(path):
        return None
    lock = str((path / LOCK).resolve())
    try:
        process = psutil.Process(owner.pid)
        return process if any(file.path == lock for file in process.open_files()) else None
    except psutil.Error:
        return None


def stop(path: Path) -> None:
    """Let the run finish its step and save a checkpoint. Raises RunError where it cannot be asked to."""
    process = owner_process(path)
    if process is None:
        if is_locked(path) or is_locked_elsewhere(path):
            raise RunError(f"{path.name}: runs on another machine or in another container; stop it there")
        raise RunError(f"{path.name}: does not run any more; reload the page")
    process.terminate()


def discard(path: Path) -> None:
    """End the run without saving, and remove its folder. Raises RunError where its process is out of reach."""
    process = owner_process(path)
    if process is None and (is_locked(path) or is_locked_elsewhere(path)):
        raise RunError(f"{path.name}: runs on another machine or in another container; stop it there")
    if process is not None:
        _end(process)
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be removed ({error.strerror})") from None


def _end(process: psutil.Process) -> None:
    # The second signal ends training at once; the last one needs no cooperation.
    for end in (process.terminate, process.terminate, process.kill):
        try:
            end()
            process.wait(PATIENCE)
        except psutil.TimeoutExpired:
            continue
        except psutil.NoSuchProcess:
            pass
        return
