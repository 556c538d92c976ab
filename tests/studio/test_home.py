"""The first page: runs in all states, the queue, and sweeps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from parley.errors import UsageError
from parley.studio import queue as queue_module
from parley.studio import summaries
from parley.studio.state import Studio
from parley.studio.sweep import sweep
from parley.training.run_lock import RunLock
from parley.training.run_summary import read_run

SETTINGS = "model: parley-demo\ndata: parley-demo-pirate  # the pirate's\n"


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started: everything waits."""
    monkeypatch.setattr(queue_module, "devices", lambda: ())
    monkeypatch.setattr(queue_module, "CPU", "none")


def write_run(root: Path, name: str, *outcomes: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("model: parley-demo\ndata: rows.jsonl\n")
    events = [{"event": "start", "step": 0, "max_steps": 9, "host": "here", "pid": 1}]
    events += [{"event": "step", "step": 3, "loss": 1.25}, *({"event": each, "step": 3} for each in outcomes)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def test_a_newcomer_reads_the_first_steps(client: TestClient) -> None:
    text = client.get("/").text
    assert "First steps" in text
    assert 'href="/train"' in text


def test_runs_in_all_states_and_in_folders_are_listed(studio: Studio, client: TestClient) -> None:
    for name in ("finished", "stopped", "failed"):
        write_run(studio.root, f"group/{name} run", name)
    lock = RunLock(write_run(studio.root, "by-hand"))
    (studio.root / "odd").mkdir()
    (studio.root / "odd" / "run.yaml").write_text("[")
    text = client.get("/").text
    for state in ("finished", "stopped", "failed", "running", "broken"):
        assert f'class="state {state}"' in text
    assert 'href="/runs/group/stopped%20run"' in text
    assert client.get("/runs/group/stopped%20run").status_code == 200
    assert "3 / 9" in text
    assert "First steps" not in text
    lock.release()


def test_the_queue_is_reordered_and_emptied_from_the_page(studio: Studio, client: TestClient) -> None:
    for name in ("a", "b"):
        studio.start_run(SETTINGS, name)
    ids = {job.run_id: job.id for job in studio.queue.jobs()}
    text = client.get("/").text
    assert text.index("<b>a</b>") < text.index("<b>b</b>")
    text = client.post(f"/queue/{ids['b']}", data={"action": "up"}).text
    assert text.index("<b>b</b>") < text.index("<b>a</b>")
    assert "<b>a</b>" not in client.post(f"/queue/{ids['a']}", data={"action": "cancel"}).text
    assert client.post(f"/queue/{ids['a']}", data={"action": "cancel"}).status_code == 400
    assert client.post(f"/queue/{ids['b']}", data={"action": "explode"}).status_code == 400
    assert client.post("/queue/..%2f..%2fx", data={"action": "cancel"}).status_code in (400, 404)


def test_a_sweep_is_a_run_for_each_combination(studio: Studio, client: TestClient) -> None:
    studio.draft.write(SETTINGS)
    form = {"name": "try", "key1": "training.learning_rate", "values1": "1e-4, 2e-4"}
    form |= {"key2": "lora.r", "values2": "8, 16", "key3": "", "values3": ""}
    assert "4 runs" in client.post("/sweep", data=form).text
    jobs = studio.queue.jobs()
    assert [job.run_id for job in jobs] == [
        "try-learning_rate-0.0001-r-8", "try-learning_rate-0.0001-r-16",
        "try-learning_rate-0.0002-r-8", "try-learning_rate-0.0002-r-16",
    ]  # fmt: skip
    settings = Path(jobs[2].arguments[1]).read_text()
    assert "learning_rate: 0.0002" in settings
    assert "r: 8" in settings


def test_a_sweep_with_a_wrong_value_queues_nothing(studio: Studio, client: TestClient) -> None:
    form = {"key1": "training.learning_rate", "values1": "1e-4, fast"}
    assert client.post("/sweep", data=form).status_code == 400
    assert studio.queue.jobs() == []


def test_a_sweep_keeps_the_rest_of_the_settings() -> None:
    ((name, text),) = sweep(SETTINGS, {"training.seed": "5"})
    assert name == "seed-5"
    assert text.startswith(SETTINGS)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "nothing to vary"),
        ({"training.seed": ""}, "got no value"),
        ({"training.seed": "1, 1"}, "twice"),
        ({"seed": "1"}, "dotted name"),
        ({"training.seed": "[1, 2]"}, "single values"),
        ({"training.seed": "1: ["}, "YAML"),
        ({"training.seed": ", ".join(map(str, range(65)))}, "64 at most"),
        ({"training.seed": ", ".join(map(str, range(9))), "lora.r": "1, 2, 3, 4, 5, 6, 7, 8"}, "72 combinations"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(values: dict[str, str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        sweep(SETTINGS, values)


def test_a_run_that_could_not_start_shows_its_output(studio: Studio, client: TestClient) -> None:
    studio.start_run(SETTINGS, "a")
    with studio.queue._locked() as jobs:
        jobs[0].state = "failed"
    (studio.queue.jobs_folder / f"{studio.queue.jobs()[0].id}.log").write_text("parley: error: <b>no card</b>\n")
    text = client.get("/").text
    assert "could not start" in text
    assert "&lt;b&gt;no card&lt;/b&gt;" in text


def test_a_summary_is_read_again_when_the_run_has_changed(
    studio: Studio, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(studio.root, "a", "stopped")
    reads: list[Path] = []
    monkeypatch.setattr(summaries, "read_run", lambda path: reads.append(path) or read_run(path))
    for _ in range(3):
        assert 'class="state stopped"' in client.get("/").text
    assert reads == [folder]
    lock = RunLock(folder)
    assert 'class="state running"' in client.get("/").text
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": 4, "loss": 0.5}) + "\n")
    assert "0.5" in client.get("/").text
    lock.release()


def test_a_run_that_is_killed_is_not_running_any_more(studio: Studio, client: TestClient) -> None:
    lock = RunLock(write_run(studio.root, "a"))
    assert 'class="state running"' in client.get("/").text
    os.close(lock._descriptor)  # as the kernel does with a process that is killed: the file stays
    assert 'class="state failed"' in client.get("/").text
