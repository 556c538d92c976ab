"""A folder that is written whole or not at all, by one process at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from parley.errors import RunError, UsageError
from parley.training.run_folder import is_disk_full
from parley.training.run_lock import LOCK, RunLock

CONTENT = "content"


def refuse_existing(place: Path) -> None:
    """Raises UsageError where there is something at `place`."""
    if place.exists() or place.is_symlink():
        raise UsageError(f"{place}: exists; remove it, or choose another --output")


def write_folder(place: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `place`, then rename it: nothing half-written is ever at `place`.

    Raises RunError where it cannot be written or another process writes it, UsageError where it exists; leaves nothing
    behind then.
    """
    made = [parent for parent in (place.parent, *place.parent.parents) if not parent.exists()]
    try:
        _write(place, write)
        made = []
    except (OSError, SafetensorError) as error:
        if isinstance(error, RunError):
            raise
        if is_disk_full(error):
            raise RunError(f"disk full while writing {place}; free space, or choose another --output") from None
        if isinstance(error, OSError) and error.filename is not None:
            raise RunError(f"{place}: cannot be written ({error.strerror}); choose another --output") from None
        raise
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _write(place: Path, write: Callable[[Path], None]) -> None:
    scratch = place.with_name(f".{place.name}.unfinished")
    scratch.mkdir(parents=True, exist_ok=True)
    lock = RunLock(scratch)
    try:
        refuse_existing(place)  # again: another process may have written it since
        _clear(scratch)  # of an export that was killed
        content = scratch / CONTENT
        content.mkdir()
        write(content)
        content.rename(place)
    finally:
        _clear(scratch)
        lock.release()
        with suppress(OSError):  # another process may wait for the lock in it
            scratch.rmdir()


def _clear(scratch: Path) -> None:
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
