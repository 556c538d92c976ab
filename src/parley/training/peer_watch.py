"""A thread that ends this process once another one of the run has failed.

A process that waits in a collective operation for one that is gone would wait until the operation's timeout, and
launchers wait half a minute before they kill it. So each process writes its process id into a store of the main
process and looks, twice a second, whether a process of its own machine is gone or any process has noted a failure. A
store that no longer answers means that the main process is gone.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed as dist

INTERVAL = 0.5  # seconds between two looks
GRACE = 3.0  # seconds that this process has to end by itself, once another has failed
REAPED = 1.5  # seconds after which a launcher has collected an ended process, so that its id is free
LONGEST_WAIT = 600.0  # seconds for the main process to save what a failed run leaves
FAILURES, LOST = "failures", "lost"


class PeerWatch:
    """Watches from construction to `stop`, or until it ends this process.

    Args:
        share: gives every process what the main one hands in.
    """

    def __init__(self, rank: int, count: int, share: Callable[[Any], Any]) -> None:
        self.rank, self.count = rank, count
        self.clean_ups: list[Callable[[], None]] = []
        self._stopped = threading.Event()
        host = os.environ.get("MASTER_ADDR", "localhost")
        timeout = timedelta(seconds=60)
        store = None
        if self.is_main:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = share(None if store is None else store.port)
        self.store = store or dist.TCPStore(host, port, is_master=False, timeout=timeout)
        self.store.set(f"process-{rank}", f"{os.getpid()} {_machine()}")
        self.store.add(FAILURES, 0)
        self._local = self._local_peers()  # process ids by rank
        self._thread = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._thread.start()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def is_first_failure(self) -> bool:
        """Note a failure of this process; whether no process has noted one before."""
        try:
            return self.store.add(FAILURES, 1) == 1
        except RuntimeError:  # torch's DistNetworkError: the main process is gone, and has said why
            return False

    def peer_failed(self) -> bool:
        """Whether another process has noted a failure, or is gone."""
        try:
            return self.store.add(FAILURES, 0) > 0 or self.lost_peer() is not None
        except RuntimeError:
            return True

    def wait_for_failure(self) -> None:
        """Return once a process has noted a failure."""
        end = time.monotonic() + LONGEST_WAIT
        while time.monotonic() < end and not self.peer_failed():
            time.sleep(INTERVAL)

    def lost_peer(self, *, wait: bool = False) -> int | None:
        """The rank of a process of this machine that is gone. `wait`: until a launcher would have collected it."""
        end = time.monotonic() + (REAPED if wait else 0)
        while True:
            lost = next((rank for rank, pid in self._local.items() if not _is_alive(pid)), None)
            if lost is not None or time.monotonic() >= end:
                return lost
            time.sleep(0.1)

    def end_because_of(self, lost: int) -> None:
        """End this process; the first to do so says which one is gone."""
        if self.is_first_failure():
            message = f"rank {lost} (process {self._local[lost]}) is gone without a message; all processes end"
            os.write(2, f"parley: error: rank {self.rank}: {message}\n".encode())
        self._end()

    def outlive_peers(self) -> None:
        """In the main process: wait a little for the others to end, which would complain of a store that is gone."""
        end = time.monotonic() + 2 * GRACE
        while self.is_main and time.monotonic() < end and any(map(_is_alive, self._local.values())):
            time.sleep(0.1)

    def _local_peers(self) -> dict[int, int]:
        peers = {}
        for rank in range(self.count):
            pid, _, machine = self.store.get(f"process-{rank}").decode().partition(" ")
            if rank != self.rank and machine == _machine():
                peers[rank] = int(pid)
        return peers

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            lost = self.lost_peer()
            if lost is None and not self.peer_failed():
                continue
            # Most errors are had by every process: then this one's main thread is ending already.
            if lost is None and self._stopped.wait(GRACE):
                return
            if self._stopped.is_set():
                return
            if lost is not None:
                time.sleep(INTERVAL)  # one that failed with a message of its own has noted it before it was gone
                self.end_because_of(lost)
            self._end()

    def _end(self) -> None:
        for clean_up in self.clean_ups:
            clean_up()
        sys.stdout.flush()
        self.outlive_peers()
        os._exit(1)  # the main thread may be in a call that does not return


def _machine() -> str:
    """Equal for processes that see each other's ids: of one machine, and there of one container."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
