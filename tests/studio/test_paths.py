"""No page opens, names or serves a file outside of the allowed folders, however a request or a setting spells it."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from parley.config import RunConfig
from parley.errors import UsageError
from parley.studio.state import Studio

MARK = "the-text-of-a-secret-file"
HUB = "hub-organisation/model"


@pytest.fixture
def secret(tmp_path: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file outside, with links to it and to its folder among the runs; and a run whose own files are links to it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.yaml").write_text(f"model: {MARK}\n")
    (outside / "events.jsonl").write_text(json.dumps({"event": "answers", "step": 1, "answers": [MARK]}) + "\n")
    (outside / "secret").write_text(MARK)
    (studio.root / "link").symlink_to(outside)
    run = studio.root / "mine"
    (run / "exports" / "gguf-q8_0").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "run.yaml").write_text("model: parley-demo\n")
    for name in ("report.html", "report.json", "events.jsonl"):
        (run / name).symlink_to(outside / "secret")
    (run / "exports" / "gguf-q8_0" / "export.json").write_text("{}")
    (run / "exports" / "gguf-q8_0" / "model.gguf").symlink_to(outside / "secret")
    (run / "exports" / "away").symlink_to(outside)
    (outside / "export.json").write_text("{}")
    monkeypatch.chdir(studio.root)
    return outside / "secret"


SPELLINGS = ("{secret}", "../outside/{name}", "link/{name}", "mine/../../outside/{name}", "..%2foutside%2f{name}", "~")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "route",
    [
        "/runs/{}", "/events/{}?once=yes", "/reports/{}", "/batches/{}?step=1", "/train/started/{}", "/static/{}",
        "/compare?run={}", "/export?run={}", "/export/list?run={}", "/export/zip?run=mine&name={}",
        "/export/file?run=mine&name=gguf-q8_0&file={}", "/export/file?run={}&name=gguf-q8_0&file=model.gguf",
        "/export/zip?run={}&name=gguf-q8_0", "/export/estimate?run={}&target=gguf",
    ],
)  # fmt: skip
def test_no_route_opens_a_place_outside(client: TestClient, secret: Path, route: str, spelling: str) -> None:
    for name in ("", "secret"):
        text = spelling.format(secret=secret.parent / name, name=name)
        response = client.get(route.format(quote(text, safe="")), follow_redirects=False)
        assert MARK not in response.text
        assert response.status_code >= 400 or "problem" in response.text
        assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "route",
    [
        "/runs/mine", "/events/mine?once=yes", "/reports/mine", "/export/zip?run=mine&name=gguf-q8_0",
        "/export/zip?run=mine&name=away", "/export/file?run=mine&name=gguf-q8_0&file=model.gguf", "/", "/runs",
    ],
)  # fmt: skip
def test_a_link_inside_of_a_run_leads_nowhere(client: TestClient, secret: Path, route: str) -> None:
    response = client.get(route)
    assert MARK not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


def settings_outside(outside: str) -> list[tuple[str, dict[str, object]]]:
    return [
        ("deepspeed", {"training": {"deepspeed": outside}}),
        ("fsdp_config", {"training": {"fsdp_config": outside}}),
        ("accelerator_config", {"training": {"accelerator_config": outside}}),
        ("chat_template_path", {"training": {"chat_template_path": outside}}),
        ("logging_dir", {"training": {"logging_dir": "../../x"}}),
        ("resume_from_checkpoint", {"training": {"resume_from_checkpoint": "~/x"}}),
        ("nested", {"training": {"model_init_kwargs": {"a": [outside]}}}),
        ("lora", {"lora": {"corda_config": {"cache_file": outside}}}),
        ("linked", {"training": {"deepspeed": "link"}}),
        ("chat_template", {"model": {"chat_template": outside}}),
        ("data", {"data": {"source": outside}}),
        ("heldout", {"data": {"heldout": "link/run.yaml"}}),
        ("model", {"model": {"name": "link"}}),
        ("model revision", {"model": {"name": "a/b", "revision": "../../../../x"}}),
        ("data revision", {"data": {"source": "a/b", "revision": "/x"}}),
        ("data subset", {"data": {"source": "a/b", "subset": "../x"}}),
        ("data split", {"data": {"source": "a/b", "split": "../x"}}),
        ("rewards", {"training": {"method": "grpo", "rewards": ["os:system"]}}),
        ("remote code", {"model": {"trust_remote_code": True}}),
    ]


@pytest.mark.parametrize("index", range(19), ids=[name for name, _ in settings_outside("")])
def test_no_setting_names_a_place_outside_or_a_program(
    client: TestClient, studio: Studio, secret: Path, index: int
) -> None:
    _, values = settings_outside(str(secret))[index]
    with pytest.raises(UsageError, match=r"--allow|not a path|starts no code"):
        studio.check_settings(RunConfig.create(values))
    for route in ("/train/predict", "/train/start"):
        response = client.post(route, data={"settings": json.dumps(values)})
        assert MARK not in response.text
    assert studio.queue.jobs() == []


def test_names_that_are_no_paths_are_left_alone(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    values = {
        "training": {"hub_model_id": HUB, "run_name": "a/b", "optim": "adamw_torch", "deepspeed": str(studio.root)},
        "lora": {"target_modules": r".*\.q_proj"},
        "model": {"name": HUB, "revision": "refs/pr/1"},
    }
    studio.check_settings(RunConfig.create(values))
