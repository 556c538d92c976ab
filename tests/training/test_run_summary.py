"""What a run's folder says about it: states, figures, differences, and folders that hold something else."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from parley.errors import RunError
from parley.training.run_diff import diff_runs
from parley.training.run_lock import LOCK, Owner, RunLock
from parley.training.run_outcome import process_identity, recorded_outcome
from parley.training.run_summary import list_runs, read_run


def make_run(path: Path, *events: dict[str, Any], report: Any = None, settings: str | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "run.yaml").write_text(settings or "model: {name: owner/model}\ndata: {source: rows.jsonl}\n")
    if events:
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if report is not None:
        (path / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return path


ELSEWHERE = json.dumps({"pid": 1, "host": "elsewhere", "boot": "another"})
STEP = {"event": "step", "step": 3, "loss": 1.5}


@pytest.mark.parametrize(
    ("last", "lock", "state"),
    [
        ("finished", None, "finished"),
        ("stopped", None, "stopped"),
        ("failed", None, "failed"),
        ("save", None, "failed"),
        ("save", "{}", "failed"),
        ("save", "this process", "failed"),  # killed: the file is left, the lock is not
        ("save", ELSEWHERE, "running"),  # it wrote a moment ago
        ("stopped", ELSEWHERE, "stopped"),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, last: str, lock: str | None, state: str) -> None:
    start = {"event": "start", "step": 0, "max_steps": 10, **process_identity()}
    path = make_run(tmp_path / "x", start, STEP, {"event": last, "step": 3})
    if lock is not None:
        # Not in the parameter: its text would name the test differently in each process of pytest-xdist.
        (path / LOCK).write_text(json.dumps(asdict(Owner.this_process())) if lock == "this process" else lock)
    run = read_run(path)
    assert (run.state, run.step, run.max_steps, run.loss) == (state, 3, 10, 1.5)
    assert (run.model, run.data) == ("owner/model", "rows.jsonl")
    assert run.size > 100


@pytest.mark.parametrize("last", ["start", "stopped", "save"])
def test_a_run_whose_lock_is_held_is_running(tmp_path: Path, last: str) -> None:
    """Also before its first event, and while a run that was stopped is loaded again."""
    path = make_run(tmp_path / "x", STEP, {"event": last, "step": 3})
    lock = RunLock(path)
    assert read_run(path).state == "running"
    lock.release()
    assert read_run(path).state == ("stopped" if last == "stopped" else "failed")


def test_a_lock_that_is_a_pipe_does_not_block(tmp_path: Path) -> None:
    path = make_run(tmp_path / "x", STEP)
    os.mkfifo(path / LOCK)
    assert read_run(path).state == "failed"


def test_a_silent_run_of_another_machine_has_ended(tmp_path: Path) -> None:
    path = make_run(tmp_path / "x", {"event": "start", "step": 0}, STEP)
    (path / LOCK).write_text(ELSEWHERE)
    for file in path.iterdir():
        os.utime(file, (1e9, 1e9))
    assert read_run(path).state == "failed"


def test_a_resumed_run_goes_by_its_last_start(tmp_path: Path) -> None:
    start = {"event": "start", "step": 0, "max_steps": 10, **process_identity()}
    path = make_run(tmp_path / "x", start, STEP, {"event": "stopped", "step": 3}, start | {"step": 3, "max_steps": 20})
    assert (read_run(path).state, read_run(path).max_steps) == ("failed", 20)


def test_runs_of_older_versions_have_no_outcome(tmp_path: Path) -> None:
    path = make_run(tmp_path / "x", {"event": "start", "step": 0, "max_steps": 3}, STEP, report={"notes": []})
    assert read_run(path).state == "failed"
    (path / "adapter").mkdir()
    (path / "report.html").write_text("")
    assert read_run(path).state == "finished"
    (path / "report.json").write_text(json.dumps({"notes": ["stopped by hand at step 3"]}))
    assert read_run(path).state == "stopped"


def test_figures_that_are_not_numbers(tmp_path: Path) -> None:
    path = make_run(tmp_path / "x", report={"after": {"heldout_loss": "NaN"}})
    (path / "events.jsonl").write_text('{"event": "step", "step": 2, "loss": NaN}\n{"event": "step", "step": 3, "lo')
    run = read_run(path)
    assert run.heldout_loss != run.heldout_loss
    assert (run.step, run.loss) == (None, None)  # the last line of a killed run may be half a line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", "[a, list]"),
        ("run.yaml", "a: [1"),
        ("run.yaml", "a: &a [*a]"),
        ("run.yaml", "\x00\x01"),
        ("report.json", "[" * 100_000),
        ("report.json", "[1, 2]"),
        ("report.json", '{"after": 3, "notes": {"a": 1}, "data_summary": "x", "versions": [1]}'),
        ("events.jsonl", "\xff\xfe nonsense\n[]\n3\n"),
        ("events.jsonl", '{"event": "start", "pid": "x", "host": [], "process_started": {}}\n'),
        ("events.jsonl", '{"event": "start", "pid": -5, "max_steps": 1e400}\n{"event": ["start"]}\n'),
        ("events.jsonl", '{"event": "step", "step": true, "loss": [1]}\n'),
    ],
)
def test_broken_folders_are_listed_and_compared_all_the_same(tmp_path: Path, name: str, content: str) -> None:
    good = make_run(tmp_path / "good", STEP)
    path = make_run(tmp_path / "bad", STEP)
    (path / name).write_text(content)
    found = {Path(run.path).name: run for run in list_runs(tmp_path)}
    assert set(found) == {"good", "bad"}
    assert (found["bad"].state == "broken") == (name == "run.yaml")
    assert (found["bad"].reason is not None) == (name == "run.yaml")
    diff_runs(read_run(path), read_run(good), everything=True)


def test_only_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for index, name in enumerate(("old", "new", "group/inner", "a/b/c/too/deep")):
        path = make_run(tmp_path / name, STEP)
        make_run(path / "nested", STEP)  # part of the run
        for file in path.glob("*.*"):
            os.utime(file, (1e9 + index, 1e9 + index))
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "not a run").mkdir()
    (tmp_path / "file").write_text("")
    assert [Path(run.path).name for run in list_runs(tmp_path)] == ["inner", "new", "old"]
    assert [run.path for run in list_runs(tmp_path / "old")] == [str(tmp_path / "old")]
    with pytest.raises(RunError, match="no such folder"):
        list_runs(tmp_path / "absent")
    with pytest.raises(RunError, match="no run there"):
        read_run(tmp_path / "not a run")


def test_a_diff_shows_what_differs_by_section(tmp_path: Path) -> None:
    report = {
        "data_summary": {"rows": 10, "length": {"mean": 5.0}},
        "after": {"heldout_loss": 1.25},
        "resources": {"tokens_per_s": 100.0, "stages": {"model": 1.0}},
        "versions": {"torch": "2.13"},
    }
    changed = json.loads(json.dumps(report))
    changed["data_summary"]["length"]["mean"], changed["after"]["heldout_loss"] = 6.0, 1.0
    one = make_run(
        tmp_path / "a", STEP, report=report, settings="output: a\nmodel: {name: m}\ntraining: {lr: 1, x: 2}\n"
    )
    two = make_run(tmp_path / "b", STEP, report=changed, settings="output: b\nmodel: {name: m}\ntraining: {lr: 3}\n")
    found = diff_runs(read_run(one), read_run(two))
    assert found["settings"] == {"training.lr": (1, 3), "training.x": (2, None)}
    assert found["data"] == {"length.mean": (5.0, 6.0)}
    assert found["results"].pop("size")
    assert found["results"] == {"after.heldout_loss": (1.25, 1.0)}
    assert found["versions"] == {}
    everything = diff_runs(read_run(one), read_run(two), everything=True)
    assert everything["settings"]["model.name"] == ("m", "m")
    assert everything["data"]["rows"] == (10, 10)
    assert "resources.stages.model" not in everything["results"]
    assert not any(diff_runs(read_run(one), read_run(one)).values())


class Log:
    def __init__(self) -> None:
        self.begun, self.steps_done, self.events = True, 4, []  # type: ignore[var-annotated]

    def write(self, event: dict[str, Any]) -> None:
        self.events.append(event)


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (None, {"event": "finished"}),
        (KeyboardInterrupt, {"event": "stopped"}),
        (RunError("no\nspace"), {"event": "failed", "message": "no space"}),
        (OSError(28, "No space left"), {"event": "failed", "message": "OSError: [Errno 28] No space left"}),
    ],
)
def test_how_a_run_ended_is_its_last_event(error: Any, event: dict[str, str]) -> None:
    log = Log()

    def run() -> None:
        with recorded_outcome(log):  # type: ignore[arg-type]
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error if isinstance(error, type) else type(error)):
            run()
    assert log.events == [{"step": 4} | event]


def test_a_run_that_is_stopped_says_so_and_one_that_did_not_begin_says_nothing() -> None:
    log = Log()
    with recorded_outcome(log) as outcome:  # type: ignore[arg-type]
        outcome.stopped = True
    assert log.events == [{"event": "stopped", "step": 4}]
    log = Log()
    log.begun = False
    with recorded_outcome(log):  # type: ignore[arg-type]
        pass
    assert log.events == []
