"""The queue: runs that wait for their card, on disk, started as processes of their own.

`queue.json` holds the jobs that wait, in their order, and those that were started and have not ended. A process is
started as `parley train` from a shell would be: in a session of its own, its output in a file, so that it neither ends
with the studio nor needs it. Whether it runs is what the kernel says of its pid and start time.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from parley.config import RunConfig
from parley.errors import RunError, UsageError
from parley.safe_yaml import load_yaml
from parley.training.report import replace_file
from parley.training.run_lock import LOCK, is_locked

PROGRAM = (sys.executable, "-m", "parley")
CPU = "cpu"
LOG_BYTES = 64 * 2**10  # of a job's output that is shown
_NAME = re.compile(r"[^\w.-]+")


@dataclass
class Job:
    """A run that waits, runs, or ended before it had a folder. `device`: "cpu", or the index of a GPU."""

    id: str
    run_id: str
    arguments: list[str]
    state: str = "waiting"  # waiting, running, failed
    device: str | None = None
    pid: int | None = None
    started: float | None = None  # of the process, as psutil has it: pids are used again
    added: float = field(default_factory=time.time)
    code: int | None = None

    @property
    def is_alive(self) -> bool:
        return self.process() is not None

    def process(self) -> psutil.Process | None:
        """Its process while that runs."""
        if self.pid is None:
            return None
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - (self.started or 0)) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None


class Queue:
    """The jobs of one folder of runs. Several studios may use it: each change holds a lock on the file."""

    def __init__(self, root: Path, folder: Path, program: Sequence[str] = PROGRAM) -> None:
        self.root, self.folder, self.program = root, folder, program
        self.file, self.jobs_folder = folder / "queue.json", folder / "jobs"
        self._thread = threading.RLock()
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def jobs(self) -> list[Job]:
        """All that wait or run, and those that failed before their run had a folder."""
        with self._locked() as jobs:
            return list(jobs)

    def add(self, config_yaml: str, name: str | None = None) -> str:
        """Queue a new run. Returns its id, the path of its folder below the root. Raises UsageError."""
        values = load_yaml(config_yaml, "the settings")
        if not isinstance(values, dict):
            raise UsageError("the settings are no YAML mapping; write them as key: value")
        with self._locked() as jobs:
            run_id = self._free_name(name or _default_name(values), jobs)
            values["output"] = str(self.root / run_id)
            config = RunConfig.create(values)
            self.jobs_folder.mkdir(exist_ok=True)
            job_id = f"{time.time_ns():x}"
            settings = self.jobs_folder / f"{job_id}.yaml"
            settings.write_text(config.to_yaml(), encoding="utf-8")
            jobs.append(Job(job_id, run_id, ["train", str(settings)], device=_wanted_device(config)))
        self.advance()
        return run_id

    def resume(self, run_id: str) -> None:
        """Queue the rest of a run that was stopped."""
        with self._locked() as jobs:
            # A process that has stopped takes a moment to end: its job is no obstacle.
            if is_locked(self.root / run_id) or any(job.run_id == run_id and job.state == "waiting" for job in jobs):
                raise RunError(f"{run_id}: runs, or is in the queue already")
            jobs[:] = [job for job in jobs if job.run_id != run_id or job.state == "running"]
            arguments = ["train", "--resume", str(self.root / run_id)]
            jobs.append(Job(f"{time.time_ns():x}", run_id, arguments))
        self.advance()

    def cancel(self, job_id: str) -> None:
        """Take a waiting or failed job out. Raises RunError where it runs: that is for `stop`."""
        with self._locked() as jobs:
            job = _find(jobs, job_id)
            if job.state == "running":
                raise RunError(f"{job.run_id}: has started; stop it on its page")
            jobs.remove(job)
            (self.jobs_folder / f"{job_id}.yaml").unlink(missing_ok=True)

    def move(self, job_id: str, by: int) -> None:
        """Move a waiting job up (-1) or down (+1) among those that wait."""
        with self._locked() as jobs:
            waiting = [job for job in jobs if job.state == "waiting"]
            place = waiting.index(_find(waiting, job_id))
            target = min(max(place + by, 0), len(waiting) - 1)
            waiting.insert(target, waiting.pop(place))
            jobs[:] = [job for job in jobs if job.state != "waiting"] + waiting

    def advance(self) -> int:
        """Take out what has ended, and start the first that waits for each device that is free; returns how many."""
        started = 0
        with self._locked() as jobs:
            for job in [job for job in jobs if job.state == "running" and not job.is_alive]:
                self._end(job, jobs)
            waiting = [job for job in jobs if job.state == "waiting"]
            busy = {job.device for job in jobs if job.state == "running"}
            if waiting:
                free = [device for device in devices() if device not in busy]
                busy.update(free[: self._others(jobs)])
            for job in waiting:
                device = job.device if job.device == CPU else next((d for d in devices() if d not in busy), None)
                if device is not None and device not in busy:
                    self._start(job, device)
                    busy.add(device)
                    started += 1
        return started

    def log(self, job_id: str) -> str:
        """The end of a job's output."""
        try:
            with (self.jobs_folder / f"{job_id}.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _others(self, jobs: list[Job]) -> int:
        """The number of runs below the root that a terminal started; on which device, their files do not say."""
        own = {str(self.root / job.run_id) for job in jobs}
        locks = [lock for pattern in ("*", "*/*", "*/*/*") for lock in self.root.glob(f"{pattern}/{LOCK}")]
        return sum(str(lock.parent) not in own and is_locked(lock.parent) for lock in locks)

    def _start(self, job: Job, device: str) -> None:
        environment = dict(os.environ)
        if device != CPU:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self.jobs_folder.mkdir(exist_ok=True)
        with (self.jobs_folder / f"{job.id}.log").open("ab") as log:
            child = subprocess.Popen(
                [*self.program, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # no signal of the studio's terminal reaches it
            )
        self._children[child.pid] = child
        job.state, job.device, job.pid = "running", device, child.pid
        job.started = psutil.Process(child.pid).create_time()

    def _end(self, job: Job, jobs: list[Job]) -> None:
        """A job whose process has ended: its run says how, unless it has no folder."""
        child = self._children.pop(job.pid or 0, None)
        job.code = child.wait() if child is not None else None
        if (self.root / job.run_id / "run.yaml").is_file():
            jobs.remove(job)
            for suffix in ("yaml", "log"):
                (self.jobs_folder / f"{job.id}.{suffix}").unlink(missing_ok=True)
        else:
            job.state = "failed"

    def _free_name(self, name: str, jobs: list[Job]) -> str:
        """`name` as a folder's, with a number where it is taken."""
        base = _NAME.sub("-", name).strip("-.")[:80] or "run"
        taken = {job.run_id for job in jobs}
        names = [base, *(f"{base}-{n}" for n in range(2, 10_000))]
        return next(each for each in names if each not in taken and not (self.root / each).exists())

    @contextmanager
    def _locked(self) -> Iterator[list[Job]]:
        """The jobs; what the block makes of them is written back."""
        with self._thread, (self.folder / "queue.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            jobs = self._read()
            before = [asdict(job) for job in jobs]
            yield jobs
            after = [asdict(job) for job in jobs]
            if after != before:
                replace_file(self.file, json.dumps(after, indent=1), "parley studio")

    def _read(self) -> list[Job]:
        try:
            values: Any = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else []
            return [Job(**value) for value in values]
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.file}: is broken ({error}); remove it, the runs are not in it") from None


def devices() -> tuple[str, ...]:
    """Where runs may go: each GPU of this machine, by CUDA's index, or its CPU."""
    # By the device files, which are quick to count: torch takes seconds, and half a GiB that stays.
    count = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if visible is None else [n for n in visible.split(",") if n]
    return tuple(names[:count]) or (CPU,)


def _wanted_device(config: RunConfig) -> str | None:
    """`cpu` where the settings say so; None: the first that is free."""
    return CPU if config.model.device == "cpu" else None


def _default_name(values: dict[str, Any]) -> str:
    data = values.get("data")
    source = data.get("source") if isinstance(data, dict) else data
    return Path(str(source or "run")).name.partition(".")[0]


def _find(jobs: list[Job], job_id: str) -> Job:
    for job in jobs:
        if job.id == job_id:
            return job
    raise RunError("that run is not in the queue any more; reload the page")
