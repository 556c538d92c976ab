"""How fast `parley studio` is in Chromium: first paint, bytes of script and style, frames at 100,000 points, memory.

    python benchmarks/studio_speed.py

Needs Playwright and Chromium. Paint is the best of some fresh profiles. A frame is one requestAnimationFrame callback,
in which a chart is drawn, in CPU time of its thread: other programs of the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from http.cookiejar import CookieJar
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

POINTS = 100_000
EVENTS = 10_000
RECONNECTS = 200
REPEATS = 10
PAINT = """() => {
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  const page = performance.getEntriesByType("navigation")[0];
  const sum = kind => performance.getEntriesByType("resource")
    .filter(each => each.name.split("?")[0].endsWith(kind)).reduce((bytes, each) => bytes + each.encodedBodySize, 0);
  return {paint: paint.startTime, interactive: page.domContentLoadedEventEnd, script: sum(".js"), style: sum(".css")};
}"""


def step(number: int) -> str:
    figures = {
        "event": "step",
        "step": number,
        "seconds": number * 0.02,
        "loss": 1 + 2 / (1 + number / 1000) + (number * 7919 % 97) / 400,
        "grad_norm": 0.4 + (number * 104729 % 89) / 300,
        "learning_rate": 2e-4 * (1 - number / 2 / POINTS),
        "tokens_per_s": 40_000.0 + number * 31 % 1000,
        "memory_gib": 3.5,
        "num_tokens": number * 2000.0,
        "num_supervised_tokens": number * 700.0,
        "mean_token_accuracy": 0.8,
        "entropy": 0.2,
        "epoch": number / POINTS,
    }
    return json.dumps(figures) + "\n"


def write_run(root: Path, name: str, points: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("model: parley-demo\ndata: parley-demo-pirate\n")
    with (folder / "events.jsonl").open("w") as file:
        file.write(json.dumps({"event": "start", "step": 0, "max_steps": points, "host": "h", "pid": 1}) + "\n")
        file.writelines(step(number) for number in range(1, points + 1))
    return folder / "events.jsonl"


class Studio:
    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "parley", "studio", str(root), "--no-browser", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]
        self.url = self.address.partition("/?")[0]

    @property
    def memory(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


def measure_paint(browser: Any, studio: Studio, path: str) -> dict[str, float]:
    """The best of fresh profiles, so that nothing is cached."""
    found = []
    for _ in range(REPEATS):
        context = browser.new_context()
        page = context.new_page()
        page.goto(studio.address)
        page.wait_for_url(studio.url + "/")
        fresh = context.new_page()
        fresh.goto(studio.url + path)
        fresh.wait_for_timeout(500)
        found.append(fresh.evaluate(PAINT))
        context.close()
    return {name: min(each[name] for each in found) for name in found[0]}


def measure_frames(browser: Any, studio: Studio) -> list[float]:
    """Of all charts of a run of POINTS steps: while the points arrive, zooming, smoothing, and on a log scale."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.goto(studio.address)
    page.wait_for_url(studio.url + "/")
    browser.start_tracing(page=page, categories=["devtools.timeline"])
    page.goto(studio.url + "/runs/long")
    page.locator(f"#charts[data-points='{POINTS}']").wait_for(timeout=120_000)
    page.wait_for_timeout(500)
    box = page.locator("[data-column=loss] .u-over").bounding_box()
    for share in (0.9, 0.7, 0.5):
        page.mouse.move(box["x"] + 10, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + 50, steps=5)
        page.mouse.up()
        page.wait_for_timeout(200)
    page.locator("#whole").click()
    for value in ("0.5", "0.99", "0"):
        page.locator("#smoothing").fill(value)
        page.wait_for_timeout(200)
    page.locator("#log").check()
    page.wait_for_timeout(500)
    events = json.loads(browser.stop_tracing())["traceEvents"]
    context.close()
    return [event["tdur"] / 1000 for event in events if event["name"] == "FireAnimationFrame" and "tdur" in event]


def measure_memory(studio: Studio, log: Path) -> list[float]:
    """MiB before and after each of two rounds of EVENTS events that were followed, over RECONNECTS cut connections."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    opener.open(studio.address).read()

    def connect(seconds: float) -> None:
        response = opener.open(studio.url + "/events/growing")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            response.readline()
        response.close()

    for _ in range(20):
        connect(0)
    time.sleep(1)
    found = [studio.memory]
    for round in range(2):
        follow(connect, log, round * EVENTS)
        found.append(studio.memory)
    return found


def follow(connect: Callable[[float], None], log: Path, first: int) -> None:
    followers = [threading.Thread(target=connect, args=(20,)) for _ in range(2)]
    for follower in followers:
        follower.start()
    for start in range(0, EVENTS, 100):
        with log.open("a") as file:
            file.writelines(step(first + number) for number in range(start + 1, start + 101))
        connect(0)
        connect(0)
    for follower in followers:
        follower.join()
    time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_run(root, "long", POINTS)
        growing = write_run(root, "growing", 0)
        studio = Studio(root)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                for path in ("/", "/data", "/runs/long"):
                    found = measure_paint(browser, studio, path)
                    print(
                        f"{path}: first paint {found['paint']:.0f} ms, interactive {found['interactive']:.0f} ms, "
                        f"script {found['script'] / 1000:.1f} kB, style {found['style'] / 1000:.1f} kB",
                        flush=True,
                    )
                frames = sorted(measure_frames(browser, studio))
                print(
                    f"{POINTS:,} points, {len(frames)} frames: median {median(frames):.1f} ms, "
                    f"99% up to {frames[int(0.99 * len(frames))]:.1f} ms, longest {frames[-1]:.1f} ms",
                    flush=True,
                )
                browser.close()
            before, once, twice = measure_memory(studio, growing)
            print(
                f"{EVENTS:,} events, {RECONNECTS} reconnects: {before:.1f} MiB before, {once:.1f} MiB after, "
                f"{twice:.1f} MiB after as many again"
            )
        finally:
            studio.close()


if __name__ == "__main__":
    main()
