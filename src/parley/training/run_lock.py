"""One writer per run folder: `run.lock`, held by the process that trains into it.

The lock is the kernel's (flock), which ends with the process however that ends, so that a killed run is taken over
without asking. The file holds pid and host for the message. Kernels of different machines need not see each other's
locks on a shared file system: a lock that another machine left is never taken over, as its run may still be alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from parley.errors import RunError
from parley.training.checkpoint import read_json

logger = logging.getLogger(__name__)

LOCK = "run.lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine, another after a reboot
PROBE_RETRIES, PROBE_SECONDS = 5, 0.02
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """The process that holds, or held, a lock."""

    pid: int
    host: str
    boot: str

    @classmethod
    def this_process(cls) -> Owner:
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
        return cls(os.getpid(), socket.gethostname(), boot)

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """None where the file is missing, empty, or not what `RunLock` writes: its writer died before it was done."""
        try:
            values = read_json(path) if path.is_file() else {}
            return cls(int(values["pid"]), str(values["host"]), str(values["boot"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_local(self) -> bool:
        """Whether it ran on this machine, where the kernel knows if it is still alive."""
        here = Owner.this_process()
        return self.host == here.host or (self.boot != "" and self.boot == here.boot)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Held from construction to `release`. Raises RunError where another process writes into `folder`, or may."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._descriptor = self._open()
        owner = Owner.read(self.path)
        if owner is not None and not owner.is_local:
            os.close(self._descriptor)
            raise RunError(
                f"{folder} is locked by {owner}, another machine, which this one cannot ask; if that run has ended, "
                f"remove {self.path}"
            )
        if owner is not None:
            logger.warning("%s: the lock of %s is taken over, which ended without releasing it", folder, owner)
        content = json.dumps(asdict(Owner.this_process())).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)

    def _open(self) -> int:
        """An open file with the kernel's lock on it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                _lock_exclusively(descriptor)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    logger.warning("%s: this file system has no locks; do not train into it twice", self.path.parent)
                    return descriptor
                os.close(descriptor)
                if not isinstance(error, BlockingIOError):
                    raise
                raise RunError(
                    f"{self.path.parent} is being written by {Owner.read(self.path) or 'another process'}; wait until "
                    "it has ended, or stop it first"
                ) from None
            # Its owner may have removed the file between the two calls: then the lock is on a file without a name.
            if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
            os.close(descriptor)

    def release(self) -> None:
        """Remove the file and end the lock. Doing it again changes nothing."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _lock_exclusively(descriptor: int) -> None:
    """Raises BlockingIOError where another process keeps the lock: `is_locked` holds one for a moment."""
    for attempt in range(PROBE_RETRIES + 1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == PROBE_RETRIES:
                raise
            time.sleep(PROBE_SECONDS)


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine writes into `folder`."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, as Lustre may be
        owner = Owner.read(folder / LOCK)
        return owner is not None and owner.is_local and psutil.pid_exists(owner.pid)
    finally:
        os.close(descriptor)
    return False


def is_locked_elsewhere(folder: Path) -> bool:
    """Whether `folder` has the lock of another machine, whose kernel alone knows if its process is alive."""
    owner = Owner.read(folder / LOCK)
    return owner is not None and not owner.is_local
