"""The report as a real Chromium sees it: what it draws, what it would fetch, what it complains about."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from parley.training.report import Answer, Report, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

# Appended to the page under test: moves a pointer over the loss chart and notes what the page measures.
PROBE = """
<script>
addEventListener("load", () => {
  const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 5}));
  document.body.dataset.hover = document.querySelector("figure output").textContent;
  document.body.dataset.width = innerWidth;
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.fetched = performance.getEntriesByType("resource").length;
  document.body.dataset.drawn = [...document.querySelectorAll(".raw-line")]
    .filter(line => line.getBoundingClientRect().width > 0.9 * line.closest(".plot").clientWidth).length;
  parent.postMessage({...document.body.dataset}, "*");
});
</script>
"""

PHONE = """<!DOCTYPE html><body><iframe src="report.html" width="400" height="900" style="border:0"></iframe>
<script>addEventListener("message", event => Object.assign(document.body.dataset, event.data));</script></body>
"""


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and the console's messages."""
    assert CHROMIUM is not None
    profile = page.parent / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
    return done.stdout, re.findall(r".*:CONSOLE.*", done.stderr)


def test_the_page_draws_whole_without_network_or_complaint(tmp_path: Path, pirate_report: Report) -> None:
    pirate_report.answers.append(
        Answer(question="<img src=https://example.com/x.png>", before="مرحبا", after="🦜 " * 500)
    )
    page = write_report(tmp_path, pirate_report)
    page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    dom, console = browse(page, "--window-size=1200,1000", "--dump-dom")
    assert console == []
    for section in ("headline", "answers", "curves", "resources", "data", "examples", "settings", "versions", "next"):
        assert f'id="{section}"' in dom
    assert dom.count("<svg") == 5
    assert 'data-drawn="5"' in dom
    assert 'data-fetched="0"' in dom
    assert re.search(r'data-hover="step 500: [\d.]+, mean [\d.]+"', dom)


def test_nothing_sticks_out_on_a_phone(tmp_path: Path, pirate_report: Report) -> None:
    pirate_report.answers.append(Answer(question="long", before="x" * 3000, after="y" * 3000))
    pirate_report.title = "A" * 80
    page = write_report(tmp_path, pirate_report)
    page.write_text(page.read_text(encoding="utf-8") + PROBE, encoding="utf-8")
    phone = tmp_path / "phone.html"  # a frame, as Chromium opens no window narrower than 500 pixels
    phone.write_text(PHONE, encoding="utf-8")
    dom, _ = browse(phone, "--window-size=1000,1000", "--virtual-time-budget=3000", "--dump-dom")
    assert 'data-width="400"' in dom
    assert 'data-overflow="0"' in dom


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_it_follows_the_colour_scheme(tmp_path: Path, pirate_report: Report, scheme: int, dark: bool) -> None:
    page, picture = write_report(tmp_path, pirate_report), tmp_path / "report.png"
    browse(page, "--window-size=1200,800", f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}")
    width, height, corner = first_pixel(picture)
    assert (width, height) == (1200, 800)
    assert (max(corner) < 64) == dark
    assert (min(corner) > 192) != dark


def first_pixel(picture: Path) -> tuple[int, int, bytes]:
    """Width, height and the RGB of the top left pixel of an 8-bit PNG; its first row has nothing to be relative to."""
    png = picture.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    start = png.index(b"IDAT") + 4
    row = zlib.decompressobj().decompress(png[start:], 4)
    return width, height, row[1:4]
