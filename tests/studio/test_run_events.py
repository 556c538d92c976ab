"""The event log of a run in batches: complete, in order, from any position, and anew after a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from parley.studio import run_events
from parley.studio.run_events import COLUMNS, offset_of, read_batch
from parley.studio.run_view import RunView


def step(number: int, **figures: object) -> str:
    return json.dumps({"event": "step", "step": number, "seconds": number / 7, "loss": 2.0, **figures}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(step(number) for number in range(1, 101)))
    return path


def steps_after(log: Path, position: str | None) -> tuple[list[float | None], str | None, bool]:
    steps, restarted = [], False
    while (batch := read_batch(log, position)) is not None:
        restarted, position = restarted or batch.restarted, batch.position
        steps += [point[0] for point in batch.points]
    return steps, position, restarted


def test_batches_continue_where_the_last_one_ended(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "BATCH_BYTES", 700)
    first = read_batch(log, None)
    assert first is not None
    assert first.restarted
    assert 1 < len(first.points) < 20
    rest, end, restarted = steps_after(log, first.position)
    assert [point[0] for point in first.points] + rest == list(range(1, 101))
    assert not restarted
    assert read_batch(log, end) is None
    with log.open("a") as file:
        file.write(step(101))
    assert steps_after(log, end)[0] == [101]


def test_a_half_written_line_waits_for_its_end(log: Path) -> None:
    _, end, _ = steps_after(log, None)
    line = step(101)
    with log.open("a") as file:
        file.write(line[:20])
    assert read_batch(log, end) is None
    with log.open("a") as file:
        file.write(line[20:])
    assert steps_after(log, end)[0] == [101]


def test_a_line_longer_than_a_batch_is_read(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_events, "BATCH_BYTES", 100)
    log.write_text(json.dumps({"event": "answers", "step": 3, "answers": ["x" * 1000]}) + "\n" + step(4))
    batch = read_batch(log, None)
    assert batch is not None
    assert batch.others[0]["answers"] == ["x" * 1000]
    assert steps_after(log, batch.position)[0] == [4]


def test_a_resumed_run_is_read_anew(log: Path) -> None:
    _, end, _ = steps_after(log, None)
    # As EventLog.resume_after: a new file without the steps after the checkpoint, which then grows past the old end.
    kept = "".join(log.read_text().splitlines(keepends=True)[:50])
    log.write_text(kept + "".join(step(number, loss=1.0) for number in range(51, 151)))
    steps, _, restarted = steps_after(log, end)
    assert restarted
    assert steps == list(range(1, 151))


@pytest.mark.parametrize("position", ["", "7", "x.y", "-3.4", "999999999.1", "10.5", "9" * 400 + ".1"])
def test_a_strange_position_is_the_start(log: Path, position: str) -> None:
    assert offset_of(log, position) is None
    batch = read_batch(log, position)
    assert batch is not None
    assert batch.restarted


def test_only_finite_numbers_reach_the_charts(log: Path) -> None:
    log.write_text(
        step(1, loss="NaN", grad_norm="Infinity", learning_rate=True)
        + step(2, loss=10**400)
        + "[]\n{}\nnull\nbroken\n"
        + '{"event": "step", "step": "3"}\n'
        + "[" * 100_000
        + "\n"
        + json.dumps({"event": "eval", "step": 2, "eval_loss": 1.5})
        + "\n"
        + json.dumps({"event": "spike", "step": 2, "loss": 9.0, "typical": 1.0, "rows": ["row 3"]})
        + "\n"
    )
    batch = read_batch(log, None)
    assert batch is not None
    drawn = json.loads(batch.to_json(), parse_constant=lambda constant: pytest.fail(constant))
    assert [point[COLUMNS.index("loss")] for point in drawn["points"]] == [None, None]
    assert drawn["heldout"] == [[2, 1.5, None, None]]
    assert drawn["marks"] == [[2, 9.0, "spike"]]


def test_a_log_that_is_no_file_has_no_events(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert read_batch(log, None) is None
    os.mkfifo(log)
    assert read_batch(log, None) is None
    log.unlink()
    (tmp_path / "elsewhere").write_text(step(1))
    log.symlink_to(tmp_path / "elsewhere")
    assert read_batch(log, None) is None


def test_a_view_knows_answers_and_spikes_up_to_a_position(tmp_path: Path, log: Path) -> None:
    answers = {"event": "answers", "step": 100, "answers": ["Arr"]}
    spike = {"event": "spike", "step": 70, "loss": 9.0, "typical": 2.0, "rows": ["row 1", "row 2"]}
    with log.open("a") as file:
        file.write(json.dumps(spike) + "\n" + json.dumps(answers) + "\n")
    before = read_batch(log, None)
    assert before is not None
    with log.open("a") as file:
        file.write(json.dumps(answers | {"step": 200, "answers": ["Yarr"]}) + "\n")
    view = RunView(tmp_path)
    view.read(until=offset_of(log, before.position))
    assert [event["event"] for event in view.events] == ["spike", "answers"]
    assert view.faults()[0].rows == ["row 1", "row 2"]
    whole = RunView(tmp_path)
    whole.read()
    assert len(whole.events) == 3
