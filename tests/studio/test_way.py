"""A newcomer's way in Chromium, in Chinese: a file dropped, the embedded model trained on it, the answers compared.

The other pages and English are in test_pages.py; how long it takes is printed by tools/studio_pictures.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.studio.browser import chromium, needs_chromium, opened, running_studio

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
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the window"
        assert page.get_attribute("html", "lang") == "zh"

    rows = tool.first_rows(tmp_path / "pirate.jsonl", 120)
    with (
        running_studio(tmp_path / "runs") as studio,
        chromium() as browser,
        opened(browser, studio, locale="zh-CN", viewport=tool.WIDE) as page,
    ):
        answers = tool.walk(page, studio.address, rows, look, steps=STEPS, export=False)
    assert list(seen) == ["runs", "data", "model", "train", "run", "compare"]
    assert "放得下" in seen["model"]
    assert "pirate.jsonl" in seen["train"]
    assert f"{STEPS}" in seen["run"]
    base, tuned = answers.split("\n")
    assert base == "I am Parley, a very small language model."
    assert tuned != base
    assert "训练前" in seen["compare"]
