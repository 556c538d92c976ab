"""The way of a newcomer through `parley studio`, in a real browser: pictures of each page, and the time of each step.

    python tools/studio_pictures.py                                # writes docs/pictures/studio-*.png
    python tools/studio_pictures.py --language zh --theme dark --phone --output DIR
    python tools/studio_pictures.py --output none                  # times alone

Needs Playwright's Python package and Chromium. A file is dropped, the model looked at, the embedded model trained on it
for some steps, and the answers before and after compared; then the run is exported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "src/parley/assets/demo-data/train.jsonl"
QUESTION = "Hello! Who are you?"
WIDE, PHONE = {"width": 1100, "height": 820}, {"width": 390, "height": 800}
PATIENCE = 180_000  # ms, for a machine that is busy
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

SCROLLED = {"data": "#rows-title", "export": "#exports"}
"""What a picture begins with, where it is not the top of its page."""
Look = Callable[[str, Page], None]
"""Called with the name of each page when it shows what it is for."""


def walk(page: Page, address: str, rows: Path, look: Look, *, steps: int = 24, export: bool = True) -> str:
    """From the printed address to answers side by side (and an export); returns the two answers' text."""
    page.set_default_timeout(PATIENCE)
    url = address.partition("/?")[0]
    page.goto(address)
    page.wait_for_url(url + "/")
    look("runs", page)
    page.goto(url + "/data")
    page.set_input_files("#file", rows)
    page.wait_for_selector("#chosen")
    page.wait_for_selector("#rows .bubble, #rows .row, #rows article")
    page.wait_for_selector("#checks .findings, #checks .good")
    look("data", page)
    page.goto(url + "/model")
    page.wait_for_selector(".verdict")
    look("model", page)
    page.goto(url + "/train")
    settings = {"training.max_steps": str(steps), "training.learning_rate": "0.003", "data.heldout_rows": "8"}
    for key, value in settings.items():
        page.fill(f"[id='{key}']", value)
        page.keyboard.press("Tab")
        page.wait_for_selector(f"#checked .planned, #checked :text('{value}'), #checked .soft")
        page.wait_for_timeout(300)  # the editor follows the field
    page.wait_for_selector(".planned")
    look("train", page)
    page.fill("[name=name]", "pirate")
    page.click("#start")
    page.wait_for_url("**/runs/pirate")
    page.wait_for_selector(".state.finished")
    look("run", page)
    page.goto(url + "/compare?run=pirate")
    page.click("main form.card button.primary")
    page.fill("#prompt", QUESTION)
    page.click("#send")
    for place in (0, 1):
        page.wait_for_selector(f"[data-place='{place}'][aria-busy='false']")
    answers = [page.inner_text(f"[data-place='{place}']") for place in (0, 1)]
    page.click("[data-stream] section:nth-of-type(2) summary")
    page.wait_for_selector(".token")
    look("compare", page)
    if export:
        page.goto(url + "/export?run=pirate")
        page.wait_for_selector("#estimate .soft")
        page.click("#go")
        page.wait_for_selector(".commands")
        look("export", page)
    return "\n".join(answers)


@contextmanager
def studio(root: Path) -> Iterator[str]:
    """A studio on a free port; yields the address that it prints."""
    command = [sys.executable, "-m", "parley", "studio", str(root), "--no-browser", "--port", "0"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root.parent)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser_page(language: str, theme: str, phone: bool) -> Iterator[Page]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        options: dict[str, Any] = {"viewport": PHONE if phone else WIDE, "locale": language, "color_scheme": theme}
        try:
            yield browser.new_context(**options).new_page()
        finally:
            browser.close()


def first_rows(path: Path, count: int = 240) -> Path:
    """A file of a newcomer's: the first conversations of the demo's data."""
    lines = ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="en", choices=["en", "zh"])
    parser.add_argument("--theme", default="light", choices=["light", "dark"])
    parser.add_argument("--phone", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the whole page, not what a window shows")
    parser.add_argument("--output", default=str(ROOT / "docs/pictures"), help="folder, or none")
    options = parser.parse_args()
    folder = None if options.output == "none" else Path(options.output)
    started = last = time.perf_counter()

    def look(name: str, page: Page) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"{name:<8} {now - last:6.1f} s  {now - started:6.1f} s in all", flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if name in SCROLLED and not options.whole:
                page.locator(SCROLLED[name]).evaluate("element => element.scrollIntoView()")
            page.screenshot(path=folder / f"studio-{name}.png", full_page=options.whole)
        last = time.perf_counter()

    with tempfile.TemporaryDirectory() as temporary, studio(Path(temporary) / "runs") as address:
        rows = first_rows(Path(temporary) / "pirate.jsonl")
        with browser_page(options.language, options.theme, options.phone) as page:
            print(walk(page, address, rows, look))


if __name__ == "__main__":
    main()
