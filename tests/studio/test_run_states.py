"""What the page of a run says before its first step, after its process was killed, and once its folder is gone."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from parley.errors import RunError
from parley.studio.pages import run
from parley.studio.queue import Job
from parley.studio.sse import Event
from parley.studio.state import Studio


@pytest.fixture
def write(studio: Studio) -> Callable[..., Path]:
    def write_run(*, training: str, log: str) -> Path:
        folder = studio.root / "mine"
        folder.mkdir()
        (folder / "run.yaml").write_text(f"model: parley-demo\ntraining: {training}\n")
        (folder / "events.jsonl").write_text(log)
        answers = [{"question": [{"role": "user", "content": "Who are you?"}]}]
        (folder / "report.json").write_text(json.dumps({"title": "", "answers": answers}))
        return folder

    return write_run


STEPS = "".join(json.dumps({"event": "step", "step": k, "loss": 2.0, "seconds": k / 2}) + "\n" for k in (1, 2, 3))


def test_a_run_that_waits_leads_to_the_page_of_its_start(
    client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/runs/mine").status_code == 400
    monkeypatch.setattr(studio.queue, "jobs", lambda: [Job("1", "mine", ["train"])])
    response = client.get("/runs/mine", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/train/started/mine")


def test_a_run_whose_process_was_killed_has_ended(client: TestClient, write: Callable[..., Path]) -> None:
    folder = write(training="{eval_steps: null}", log=STEPS + '{"event": "step", "st')
    (folder / "run.lock").write_text("1 elsewhere\n")  # as it stays behind: the kernel's lock is gone with the process
    page = client.get("/runs/mine").text
    assert 'class="state failed"' in page
    assert "With training.eval_steps they come during training" in page
    events = client.get("/events/mine", params={"once": "yes"}).text
    assert "it was killed, or memory ran out" in events
    assert events.count("event: points") == 1
    assert events.count('"step"') == 0
    assert events.rstrip().endswith("event: end\ndata:")


def test_a_run_that_failed_says_why(client: TestClient, write: Callable[..., Path]) -> None:
    failed = json.dumps(
        {"event": "failed", "step": 3, "message": "out of <memory>: got 3; Input should be less than 2"}
    )
    write(training="{}", log=STEPS + failed + "\n")
    client.headers["Accept-Language"] = "zh"
    events = client.get("/events/mine", params={"once": "yes"}).text
    assert "out of &lt;memory&gt;：得到 3；应小于 2" in events


def test_a_page_that_returns_still_has_the_last_figures(studio: Studio, write: Callable[..., Path]) -> None:
    folder = write(
        training="{method: dpo, eval_steps: 2}", log=STEPS.replace('"loss"', '"kl": 0.25, "reward": 1, "loss"')
    )

    async def events(position: str | None) -> dict[str, Event]:
        followed = run._follow(studio, "mine", position, "en", once=True)
        return {event.name: event async for event in followed if event is not None}

    first = asyncio.run(events(None))
    assert "<dd>0.25</dd>" in first["status"].data
    again = asyncio.run(events(first["points"].id))
    assert "points" not in again
    assert "<dd>0.25</dd>" in again["status"].data, "the figures of the last step were lost"
    assert "Answers come with the first evaluation" in again["answers"].data
    shutil.rmtree(folder)
    with pytest.raises(RunError, match="no run of that name"):
        asyncio.run(events(None))
