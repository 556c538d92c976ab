"""Hostile names of runs, models and exports change nothing on the model, train, compare and export pages."""

from __future__ import annotations

import json
from pathlib import Path

from tests.studio.browser import chromium, needs_chromium, opened, running_studio
from tests.studio.test_pages import HOSTILE, check_unharmed

pytestmark = needs_chromium

NAME = '<img src=x onerror="window.owned=1">'


def test_hostile_names_change_nothing(tmp_path: Path) -> None:
    run = tmp_path / "runs" / NAME
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "run.yaml").write_text(json.dumps({"model": "parley-demo", "data": {"system": NAME}}))
    export = run / "exports" / f"gguf-{NAME}"
    export.mkdir(parents=True)
    texts = {"run": HOSTILE, "base": HOSTILE, "notes": [HOSTILE], "command": HOSTILE, "files": {HOSTILE: 1}}
    record = {"target": "gguf", "quant": "q8_0", "status": "verified", **texts}
    (export / "export.json").write_text(json.dumps(record))
    model = tmp_path / "runs" / "models" / NAME
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    pages = {"/model": NAME, "/train": "What it will take", "/compare": "beside", "/export": NAME}
    with (
        running_studio(tmp_path / "runs") as studio,
        chromium() as browser,
        opened(browser, studio, "/", viewport={"width": 390, "height": 844}) as page,
    ):
        for path, there in pages.items():
            page.goto(studio.url + path)
            page.locator("main", has_text=there).wait_for()
            check_unharmed(page)
        page.locator(".commands").wait_for(timeout=90_000)
        check_unharmed(page)
