"""A newcomer's way in Chromium: a file dropped, the embedded model trained on it, the answers compared.

Whole in Chinese, then by its pages in English. How long it takes is printed by tools/studio_pictures.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.studio.browser import chromium, needs_chromium, opened, running_studio
from tests.studio.test_pages import serious_faults

pytestmark = needs_chromium

TOOL = Path(__file__).parents[2] / "tools" / "studio_pictures.py"
STEPS = 12


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("studio_pictures", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_from_a_dropped_file_to_answers_side_by_side(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    seen: dict[str, str] = {}

    def look(name: str, page: Any) -> None:
        seen[name] = page.inner_text("main")
        if name == "train":  # before the run ends the process that the pages share: its imports take seconds
            with opened(browser, studio, **english) as other:
                check_pages_before_a_run(other, studio.url)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the window"
        assert page.get_attribute("html", "lang") == "zh"

    english = {"locale": "en-US", "color_scheme": "dark", "viewport": tool.PHONE}
    rows = tool.first_rows(tmp_path / "pirate.jsonl", 120)
    with (
        running_studio(tmp_path / "runs") as studio,
        chromium() as browser,
        opened(browser, studio, locale="zh-CN", viewport=tool.WIDE) as page,
    ):
        answers = tool.walk(page, studio.address, rows, look, steps=STEPS, export=False)
        with opened(browser, studio, **english) as other:
            check_answers_in_english(other, studio.url, tool.QUESTION)
    assert list(seen) == ["runs", "data", "model", "train", "run", "compare"]
    assert "放得下" in seen["model"]
    assert "pirate.jsonl" in seen["train"]
    assert f"{STEPS}" in seen["run"]
    base, tuned = answers.split("\n")
    assert base == "I am Parley, a very small language model."
    assert tuned != base
    assert "训练前" in seen["compare"]


def check_page(page: Any, url: str, path: str, text: str) -> None:
    page.goto(url + path)
    page.locator("main", has_text=text).wait_for(timeout=60_000)
    assert page.get_attribute("html", "lang") == "en"
    assert serious_faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{path} is wider than a phone"


def check_pages_before_a_run(page: Any, url: str) -> None:
    """In another browser: dark, on a phone."""
    for path, text in {
        "/": "First steps",
        "/data": "Recognised as",
        "/model": "fits",
        "/train": "Usually 0.0002",
    }.items():
        check_page(page, url, path, text)


def check_answers_in_english(page: Any, url: str, question: str) -> None:
    """The same run and the same loaded model, in another browser: dark, on a phone, blind, by the keyboard."""
    check_page(page, url, "/runs/pirate", "finished")
    page.goto(url + "/compare?run=pirate")
    page.fill("#prompt", question)
    page.check("[name=blind]")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[data-vote]:not([hidden])")
    assert page.locator(".sides h2").all_inner_texts() == ["A", "B"]
    assert serious_faults(page) == []
    page.focus("[data-vote] button")
    page.keyboard.press("Enter")
    page.locator(".after", has_text="Preference pairs saved: 1, in").wait_for()
    assert set(page.locator(".sides h2").all_inner_texts()) == {
        "before: the base (parley-demo)",
        "after: tuned (pirate)",
    }
