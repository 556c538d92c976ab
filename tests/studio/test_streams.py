"""Many pages of runs in one browser, which has six connections to a host; and the charts of a preference run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.studio.browser import StudioProcess, chromium, needs_chromium, opened, running_studio

pytestmark = needs_chromium

TABS = 8


def preference_events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"event": "start", "step": 0, "max_steps": 50}]
    for k in range(1, 31):
        rewards = {"rewards/chosen": k / 20, "rewards/rejected": -k / 30, "rewards/margins": k / 12}
        scores = {"preference_accuracy": 0.5 + k / 60, "rewards/accuracies": 0.5, "kl": k / 25}
        events.append({"event": "step", "step": k, "loss": 0.7 - k / 60, "seconds": k / 4, **rewards, **scores})
    events.append({"event": "eval", "step": 30, "eval_loss": 0.4, "eval_preference_accuracy": 0.95})
    return events


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "runs"
    supervised = [{"event": "step", "step": 1, "loss": 2.0, "seconds": 1.0}]
    for name, events in (("pairs", preference_events()), ("supervised", supervised)):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.yaml").write_text("model: parley-demo\n")
        (folder / name / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


@pytest.fixture(scope="module")
def studio(root: Path) -> Iterator[StudioProcess]:
    with running_studio(root) as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


def shown_charts(page: Any) -> list[str]:
    return [each.get_attribute("data-column") for each in page.locator("figure.chart:visible").all()]


def test_a_preference_run_shows_rewards_margins_accuracy_and_divergence(studio: StudioProcess, browser: Any) -> None:
    rewards = ["preference_accuracy", "rewards/margins", "rewards/chosen", "rewards/rejected", "kl"]
    with opened(browser, studio, "/runs/pairs") as page:
        page.locator("figure[data-column=kl]").wait_for()
        assert shown_charts(page)[1:6] == rewards
        facts = page.locator(".facts")
        facts.get_by_text("Reward margin").wait_for()
        assert facts.locator("div", has_text="Preference accuracy").locator("dd").inner_text() == "1"
        legend = page.locator("figure[data-column=preference_accuracy] .u-legend")
        assert "Held-out" in legend.inner_text()
        page.goto(studio.url + "/runs/supervised")
        page.locator("#charts[data-points='1']").wait_for()
        assert not set(rewards) & set(shown_charts(page))


def test_eight_pages_of_runs_leave_connections_for_others(root: Path, studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/runs/supervised") as page:
        pages = [page, *(page.context.new_page() for _ in range(TABS - 1))]
        for tab in pages[1:]:
            tab.goto(studio.url + "/runs/supervised")
        for tab in pages:
            tab.locator("#charts[data-points='1']").wait_for()
        last = page.context.new_page()
        last.goto(studio.url + "/train")  # its scripts, and a request of its own
        last.locator("#checked .card").first.wait_for()
        modes = [tab.get_attribute("#charts", "data-stream") for tab in pages]
        assert sorted(modes) == ["asking"] * (TABS - 3) + ["open"] * 3
        with (root / "supervised" / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "step", "step": 2, "loss": 1.5, "seconds": 2.0}) + "\n")
        for tab in pages:
            tab.locator("#charts[data-points='2']").wait_for()

        # A page that nobody sees has no stream, and has missed nothing when it is seen again.
        hide = "value => { Object.defineProperty(document, 'hidden', {value, configurable: true});"
        hide += " document.dispatchEvent(new Event('visibilitychange')); }"
        for tab in pages[:4]:
            tab.evaluate(hide, True)
            tab.locator("#charts[data-stream=closed]").wait_for(state="attached")
        for tab in pages[4:7]:
            tab.locator("#charts[data-stream=open]").wait_for(state="attached")
        with (root / "supervised" / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "step", "step": 3, "loss": 1.5, "seconds": 3.0}) + "\n")
        pages[4].locator("#charts[data-points='3']").wait_for()
        assert pages[0].get_attribute("#charts", "data-points") == "2"
        pages[0].evaluate(hide, False)
        pages[0].locator("#charts[data-points='3']").wait_for()
        assert pages[0].locator("#offline").is_hidden()
