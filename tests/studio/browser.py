"""A studio in a process of its own, as `parley studio` starts it, and a Chromium that has opened it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

needs_chromium = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium, which .ci/run installs where it can: apt-get install chromium"
    ),
]


class StudioProcess:
    """`address` holds the token; `url` does not."""

    def __init__(self, root: Path, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "parley", "studio", str(root), "--no-browser", "--port", str(port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[-1]
        self.url = self.address.partition("/?")[0]
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running_studio(root: Path, *options: str, port: int = 0) -> Iterator[StudioProcess]:
    studio = StudioProcess(root, *options, port=port)
    try:
        yield studio
    finally:
        studio.close()


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Any, studio: StudioProcess, path: str = "/", *, strict: bool = True, **options: Any
) -> Iterator[Any]:
    """A page of the studio; with `strict` nothing may be written to its console, which has refusals by the policy."""
    context = browser.new_context(**({"locale": "en-US"} | options))
    context.set_default_timeout(60_000)  # eight test runs may share two cores
    # The token's page is closed before this one opens: what it still loads is not this one's complaint.
    first = context.new_page()
    first.goto(studio.address)
    first.wait_for_url(studio.url + "/")
    first.close()
    page = context.new_page()
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(studio.url + path)
    try:
        yield page
        assert not strict or not complaints, complaints
    finally:
        context.close()
