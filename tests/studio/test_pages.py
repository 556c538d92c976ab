"""The pages in Chromium: hostile data changes nothing, axe finds no serious fault, and files are dropped and cured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.studio.browser import StudioProcess, chromium, needs_chromium, opened, running_studio

pytestmark = needs_chromium

AXE = Path(__file__).parent / "axe" / "axe.min.js"
SCRIPT = "<script>document.title='owned';window.owned=1</script><img src=x onerror=\"window.owned=1\">"
BREAKOUT = "\"'></div></main></body><svg onload=window.owned=1>{{7*7}}${7*7}<a href='javascript:window.owned=1'>"
HTMX = '<div hx-get="/runs" hx-trigger="load" hx-on::load="window.owned=1" data-hx-post="/preferences">'
OVERRIDE = "\u202emoc.live\u2066\u200f\x1b[31m\x07\x00\x9b2J\r"
EVENTS = "id: 9\n\nevent: points\ndata: {}\n\n"
WIDE = """[...document.querySelectorAll('main *')]
  .filter(each => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll'))
  .filter(each => !each.matches('.u-select') || each.getBoundingClientRect().width)  // uPlot's selection, when empty
  .map(each => each.outerHTML.slice(0, 80))"""
HOSTILE = SCRIPT + BREAKOUT + HTMX + OVERRIDE + EVENTS
ROWS = [
    {"instruction": HOSTILE, "context": OVERRIDE, "response": HOSTILE},
    {"instruction": "x" * 1_000_000, "context": "", "response": "A megabyte in one line."},
    {"instruction": "Plain", "context": "", "response": "Plain answer", HOSTILE: "a column"},
    {"instruction": "Plain", "context": "", "response": "Plain answer", HOSTILE: "a column"},
]


def write_run(root: Path, name: str, text: str, source: str) -> None:
    """A run whose every text is `text`."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(json.dumps({"model": text, "data": {"source": source}, "output": text}))
    events = [{"event": "start", "step": 0, "max_steps": 50, "host": text, "pid": 1}]
    events += [
        {"event": "step", "step": k, "loss": 2 - k / 50, "learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_s": 900.0,
         "memory_gib": 1.5, "num_supervised_tokens": 100.0 * k, "seconds": k / 4} for k in range(1, 31)
    ]  # fmt: skip
    events.insert(20, {"event": "spike", "step": 19, "loss": 3.0, "typical": 1.7, "rows": ["rows.jsonl line 1", text]})
    events.append({"event": "eval", "step": 30, "eval_loss": 1.5})
    events.append({"event": "answers", "step": 30, "answers": [text]})
    events.append({"event": "failed", "step": 30, "message": text})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    answers = [{"question": [{"role": text, "content": text}], "before": text, "reference": text}]
    (folder / "report.json").write_text(json.dumps({"title": text, "answers": answers}))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_run(folder / "runs", "<script>window.owned=1<", HOSTILE, str(folder / "rows.jsonl"))
    write_run(folder / "runs", "plain", "Plain", str(folder / "rows.jsonl"))
    (folder / "runs" / ".studio").mkdir()
    (folder / "runs" / ".studio" / "draft.yaml").write_text(f"data:\n  source: {folder / 'rows.jsonl'}\n")
    (folder / "runs" / "broken").mkdir()
    (folder / "runs" / "broken" / "run.yaml").write_text(f"- {SCRIPT}: [")
    return folder


@pytest.fixture(scope="module")
def studio(files: Path) -> Iterator[StudioProcess]:
    with running_studio(files / "runs", "--allow", str(files)) as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


def check_unharmed(page: Any) -> None:
    assert page.evaluate("window.owned") is None
    assert page.title().endswith("· Parley")
    foreign = (
        "main script, main img, main svg[onload], main [onerror], main [href^='javascript:'], main .bubble [hx-get]"
    )
    assert page.locator(foreign).count() == 0
    assert page.locator("main").count() == 1
    text = page.locator("body").inner_text()
    assert not set(text) & set("\u202e\u2066\x1b\x07\x9b\x00")
    assert page.evaluate(WIDE) == []


def serious_faults(page: Any) -> list[str]:
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']}: {node['html'][:120]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_a_hostile_data_set_changes_nothing_on_the_data_page(files: Path, studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/data", viewport={"width": 390, "height": 844}) as page:
        page.locator("#file").set_input_files(files / "rows.jsonl")
        page.locator("#rows .row").first.wait_for()
        page.locator("#lengths").wait_for()
        page.get_by_role("button", name="Tokens of row 1", exact=True).click()
        page.locator(".row").first.locator(".ids").wait_for()
        check_unharmed(page)
        assert page.locator(".row").first.locator(".bubble.assistant").inner_text().startswith("assistant\n<script>")
        assert "more characters" in page.locator(".row").nth(1).inner_text()
        assert len(page.content()) < 1_000_000
        assert serious_faults(page) == []


def test_a_hostile_run_changes_nothing_on_any_page(studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/", viewport={"width": 390, "height": 844}) as page:
        check_unharmed(page)
        page.get_by_role("link", name="<script>window.owned=1<").click()
        page.locator("#charts[data-points='30']").wait_for()
        page.locator(".chips button").click()
        page.locator("#batch li").nth(1).wait_for()
        check_unharmed(page)
        assert page.get_by_role("heading", level=1).inner_text() == "<script>window.owned=1<"
        assert "<script>" in page.locator(".sample").inner_text()
        for path in ("/runs/%3Cscript%3Ealert(1)%3C/script%3E", "/<script>", "/data/tokens/99999"):
            assert "<script>alert" not in page.request.get(studio.url + path).text()


def test_a_spike_shows_the_rows_of_its_batch(studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/runs/plain") as page:
        page.locator("#charts[data-points='30']").wait_for()
        plot = page.locator("[data-column=loss] .u-over")
        box = plot.bounding_box()
        plot.click(position={"x": box["width"] * 18.2 / 29, "y": box["height"] / 2})  # steps are 1 to 30
        page.locator("#batch .bubble.assistant").first.wait_for()
        assert "rows.jsonl line 1" in page.locator("#batch").inner_text()
        check_unharmed(page)


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-US"), ("dark", "zh-CN")])
def test_axe_finds_no_serious_fault(studio: StudioProcess, browser: Any, scheme: str, locale: str) -> None:
    with opened(browser, studio, "/", color_scheme=scheme, locale=locale) as page:
        assert serious_faults(page) == []
        for path in ("/data", "/runs/plain", "/model", "/train", "/compare", "/export"):
            page.goto(studio.url + path)
            shown = {"/data": ".facts", "/runs/plain": "#charts[data-points='30']"}.get(path, "h1")
            page.locator(shown).first.wait_for()
            assert serious_faults(page) == [], path


def test_everything_is_reached_with_the_keyboard(studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_theme_is_switched_and_stays(studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/", color_scheme="light") as page:
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        with page.expect_navigation():
            page.get_by_label("Colours").select_option("dark")
        dark = page.evaluate(background)
        assert dark != light
        page.goto(studio.url + "/data")
        assert page.evaluate(background) == dark


def test_a_file_is_cured_and_its_limit_moved(files: Path, studio: StudioProcess, browser: Any) -> None:
    with opened(browser, studio, "/data") as page:
        page.locator("#file").set_input_files(files / "rows.jsonl")
        page.get_by_text("Dolly (columns instruction, context, response)").first.wait_for()
        page.get_by_role("button", name="Leave them out data.drop=[duplicate]").click()
        page.get_by_role("button", name="take back data.drop=[duplicate]").wait_for()
        before = page.locator("#cut").inner_text()
        page.locator("#lengths svg").click(position={"x": 20, "y": 50})
        after = page.locator("#cut").inner_text()
        assert before != after
        assert "Longer rows: about 1." in after
        page.get_by_label("Search").fill("plain")
        page.locator("#rows .row").nth(1).wait_for()
        page.locator("#rows .row").nth(2).wait_for(state="detached")
        page.get_by_role("button", name="take back data.drop=[duplicate]").click()
        page.get_by_role("button", name="Leave them out data.drop=[duplicate]").wait_for()
