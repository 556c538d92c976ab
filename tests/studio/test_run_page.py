"""A run as Chromium shows it: while it trains, with the studio killed and started again, in two tabs, and stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.studio.browser import StudioProcess, chromium, needs_chromium, opened, running_studio

from parley.studio import queue as queue_module
from parley.studio.queue import Queue
from parley.studio.state import Studio
from parley.training.run_lock import is_locked

pytestmark = needs_chromium

SETTINGS = """
model: {name: parley-demo, device: cpu}
data: {source: parley-demo-pirate, heldout_rows: 8}
training: {max_steps: 100000, logging_steps: 1, gradient_checkpointing: false, save_steps: 100000}
report: {from_heldout: 1}
"""
SECONDS = 60_000  # Playwright counts milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


def write_run(root: Path, name: str, events: list[dict[str, Any]], **settings: Any) -> Path:
    """A run's folder as training leaves it, of these events."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(json.dumps({"model": "parley-demo", "data": "rows.jsonl"} | settings))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def points(page: Any) -> int:
    return int(page.locator("#charts").get_attribute("data-points") or 0)


def wait_for_points(page: Any, count: int) -> None:
    for _ in range(SECONDS // 50):  # wait_for_function would evaluate text, which the page's policy forbids
        if points(page) >= count:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{points(page)} points, wanted {count}")


def logged_steps(root: Path, name: str) -> int:
    return (root / name / "events.jsonl").read_text().count('"event": "step"')


def test_a_run_survives_the_studio_and_its_pages_lose_nothing(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    Studio(root, port=1)
    queue = Queue(root, root / ".studio")
    monkeypatch.setattr(queue_module, "devices", lambda: ())  # this process starts nothing: the studio does
    monkeypatch.setattr(queue_module, "CPU", "none")
    queue.add(SETTINGS, "mine")
    first = StudioProcess(root)
    try:
        while not is_locked(root / "mine"):
            time.sleep(0.1)
        with opened(browser, first, "/runs/mine", strict=False) as page:
            other = page.context.new_page()
            other.goto(first.url + "/runs/mine")
            wait_for_points(page, 3)
            first.kill()
            page.get_by_text("The connection is lost").wait_for(timeout=SECONDS)
            assert is_locked(root / "mine"), "the run ended with the studio"
            before = logged_steps(root, "mine")
            with running_studio(root, port=first.port) as again:
                for tab in (page, other):
                    wait_for_points(tab, before + 3)
                    assert not tab.locator("#offline").is_visible()
                page.goto(again.address)  # reopened as its user would
                page.goto(again.url + "/runs/mine")
                page.get_by_role("button", name="Stop and keep").click()
                page.get_by_text("The step is finished and saved").wait_for()
                page.locator(".state.stopped").wait_for(timeout=SECONDS)
                logged = logged_steps(root, "mine")
                for tab in (page, other):
                    wait_for_points(tab, logged)
                    assert points(tab) == logged, "points were lost, or drawn twice"
                assert [path.name for path in (root / "mine" / "checkpoints").iterdir()]

                page.get_by_role("button", name="Resume").click()
                page.get_by_text("The run continues").wait_for()  # test_run_control.py stops and discards stand-ins
    finally:
        first.close()
        for job in queue.jobs():
            if (process := job.process()) is not None:
                process.kill()
