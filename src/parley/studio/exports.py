"""The exports of runs: jobs that are under way, what is finished, and its files as one download."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import psutil

from parley.errors import RunError, UsageError

CHUNK = 2**20  # bytes of a file that are sent at a time
MOST_EVENTS = 2**20  # bytes of a job's events that are read


@dataclass(frozen=True)
class ExportJob:
    """`rows`: name and value of what was compared so far. `state`: running, done or failed."""

    id: str
    run_id: str
    target: str
    quant: str
    state: str
    stage: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Finished:
    """An export that is there: its files with their sizes, the comparison, and the command that runs it."""

    name: str
    status: str
    created: str
    files: dict[str, int]
    rows: list[tuple[str, str]]
    failure: str | None
    notes: list[str]
    command: str | None

    @property
    def size(self) -> int:
        return sum(self.files.values())


class ExportJobs:
    """Jobs by files in `folder`: RUN, target and type in ID.json, what they do in ID.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, run: Path, run_id: str, target: str, quant: str) -> str:
        """Start an export of `run`; returns the job's id. Raises UsageError while the same one is under way."""
        same = (run_id, target, quant)
        if any((job.run_id, job.target, job.quant) == same and job.state == "running" for job in self.jobs()):
            raise UsageError(f"{run_id}: is being exported to {target} already")
        self.folder.mkdir(parents=True, exist_ok=True)
        job_id = f"{time.time_ns():x}"
        facts = {"run_id": run_id, "target": target, "quant": quant}
        (self.folder / f"{job_id}.json").write_text(json.dumps(facts), encoding="utf-8")
        events = self.folder / f"{job_id}.jsonl"
        arguments = [str(run), target, quant, str(events)]
        with (self.folder / f"{job_id}.log").open("ab") as log:
            self._children[job_id] = subprocess.Popen(
                [sys.executable, "-m", "parley.studio.export_job", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it outlives the studio, as runs do
            )
        return job_id

    def jobs(self, run_id: str | None = None) -> list[ExportJob]:
        """All jobs, or those of one run, newest first."""
        found = [self._read(path) for path in sorted(self.folder.glob("*.json"), reverse=True)]
        return [job for job in found if job is not None and run_id in (None, job.run_id)]

    def job(self, job_id: str) -> ExportJob:
        """Raises UsageError for one that is not there."""
        found = next((job for job in self.jobs() if job.id == job_id), None)
        if found is None:
            raise UsageError("that export is not there any more; reload the page")
        return found

    def remove(self, job_id: str) -> None:
        """End the job where it runs, and forget it; a finished export stays in its run."""
        job = self.job(job_id)
        process = self._process(job.id, self._events(job.id))
        if process is not None and job.state == "running":
            process.terminate()
        for suffix in ("json", "jsonl", "log"):
            (self.folder / f"{job.id}.{suffix}").unlink(missing_ok=True)

    def _read(self, path: Path) -> ExportJob | None:
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            run_id, target, quant = facts["run_id"], facts["target"], facts["quant"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        events = self._events(path.stem)
        stages = [event for event in events if event.get("event") == "stage"]
        rows: list[tuple[str, str]] = next((event["rows"] for event in reversed(stages) if event.get("rows")), [])
        last: dict[str, Any] = events[-1] if events else {}
        state, error = "running", None
        if last.get("event") == "done":
            state = "done"
        elif last.get("event") == "failed":
            state, error = "failed", str(last.get("text"))
        elif self._process(path.stem, events) is None:
            state, error = "failed", "its process ended, most likely for lack of memory"
        return ExportJob(
            path.stem, run_id, target, quant, state, stages[-1]["text"] if stages else "starting", rows, error
        )

    def _events(self, job_id: str) -> list[dict[str, Any]]:
        try:
            with (self.folder / f"{job_id}.jsonl").open("rb") as file:
                lines = file.read(MOST_EVENTS).splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # the last line, half written
                break
        return found

    def _process(self, job_id: str, events: list[dict[str, Any]]) -> psutil.Process | subprocess.Popen[bytes] | None:
        """The job's process while it runs: of this studio, or by the pid and start time it wrote."""
        child = self._children.get(job_id)
        if child is not None:
            return child if child.poll() is None else None
        begun = next((event for event in events if event.get("event") == "process"), None)
        if begun is None:
            return None
        try:
            process = psutil.Process(begun["pid"])
            return process if abs(process.create_time() - begun["started"]) < 1 else None
        except psutil.Error:
            return None


def estimated(run: str, target: str, quant: str | None) -> tuple[int, float]:
    """Bytes and seconds that an export would take. Imports torch: for the worker process."""
    from parley.exporting.estimate import estimate_export

    found = estimate_export(run, target, quant)
    return found.bytes, found.seconds


def finished_exports(run: Path) -> list[Finished]:
    """The exports in the folder of `run`, newest first. Imports torch: for the worker process."""
    from parley.exporting.export import EXPORTS
    from parley.exporting.record import read_record
    from parley.exporting.table import figure_rows

    found = []
    for folder in sorted((run / EXPORTS).glob("*")) if (run / EXPORTS).is_dir() else []:
        if folder.name.startswith(".") or folder.is_symlink():
            continue
        try:
            record = read_record(folder)
        except RunError:
            continue
        figures = record.figures
        rows = [] if figures is None else figure_rows(figures)
        failure = None if figures is None else figures.failure
        found.append(
            Finished(
                folder.name, record.status, record.created, record.files, rows, failure, record.notes, record.command
            )
        )
    return sorted(found, key=lambda each: each.created, reverse=True)


def export_folder(run: Path, name: str) -> Path:
    """The folder of the export `name` of `run`. Raises RunError for another place than that."""
    parent = (run / "exports").resolve()
    folder = (parent / name).resolve()
    if folder.parent != parent or not parent.is_relative_to(run.resolve()) or not (folder / "export.json").is_file():
        raise RunError(f"{name}: no export of that name in this run")
    return folder


def export_file(folder: Path, name: str) -> Path:
    """A file of an export. Raises RunError for one outside of it."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise RunError(f"{name}: no file of that name in this export")
    return path


def zipped(folder: Path) -> Iterator[bytes]:
    """The files of `folder` as a zip archive, in pieces: weights do not compress, and nothing is kept in memory."""
    sink = _Sink()
    with ZipFile(sink, "w", ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            info = ZipInfo.from_file(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
            with path.open("rb") as file, archive.open(info, "w", force_zip64=True) as entry:
                while chunk := file.read(CHUNK):
                    entry.write(chunk)
                    yield sink.take()
            yield sink.take()
    yield sink.take()


class _Sink(io.RawIOBase):
    """A stream that cannot be sought in: what is written is taken out again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
