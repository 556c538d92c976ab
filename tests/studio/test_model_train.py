"""The model and the train page: what they show, refuse, keep and start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from parley.config import RunConfig
from parley.studio import run_form
from parley.studio.model_list import list_models
from parley.studio.queue import Job
from parley.studio.run_diff import settings_diff
from parley.studio.state import Studio
from parley.training.run_summary import read_run

HOSTILE = '<img src=x onerror="alert(1)">\u202e'


@pytest.fixture(autouse=True)
def in_this_process(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's calls run here: its process is tested elsewhere."""

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(studio.worker, "call", call)


def write_run(studio: Studio, name: str, text: str) -> None:
    (studio.root / name / "adapter").mkdir(parents=True)
    (studio.root / name / "adapter" / "adapter_config.json").write_text("{}")
    (studio.root / name / "run.yaml").write_text(text)


def test_models_are_the_embedded_one_runs_and_folders(studio: Studio, tiny_llama_folder: Path, client: Any) -> None:
    write_run(studio, "first", "model: parley-demo\n")
    (studio.root / "models" / HOSTILE).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (studio.root / "models" / HOSTILE / name).write_text("{}")
    (studio.root / "away").symlink_to(tiny_llama_folder)  # a link leads out of the folder
    found = [(model.title, model.kind) for model in list_models(studio.root, studio.roots) if model.kind != "hub"]
    assert found == [("parley-demo", "embedded"), ("first", "run"), (f"models/{HOSTILE}", "folder")]
    page = client.get("/model").text
    assert "<img" not in page
    assert "&lt;img" in page
    assert "\u202e" not in page


def test_a_model_fits_with_its_number(client: TestClient) -> None:
    text = client.get("/model/fit", params={"name": "parley-demo"}).text
    assert "fits" in text
    assert "MiB of" in text


@pytest.mark.parametrize("name", ["/etc", "../..", "~root", "\0", "x" * 5000, ""])
def test_models_outside_of_the_studios_folders_are_refused(client: TestClient, studio: Studio, name: str) -> None:
    assert client.post("/model/choose", data={"name": name}).status_code == 400
    assert studio.draft.text == ""
    assert "fits" not in client.get("/model/fit", params={"name": name}).text.replace("Does it fit", "")


def test_a_chosen_model_is_the_next_runs(client: TestClient, studio: Studio) -> None:
    response = client.post("/model/choose", data={"name": "owner/some-model"})
    assert response.headers["hx-redirect"] == "/train"
    assert studio.draft.value("model.name") == "owner/some-model"
    assert "owner/some-model" in client.get("/train").text


def test_ten_fields_of_settings_that_exist_with_their_defaults() -> None:
    assert len(run_form.FIELDS) == 10
    config = RunConfig()
    for field in run_form.FIELDS:
        section, _, name = field.key.partition(".")
        assert run_form.defaults("")[field.key] == getattr(getattr(config, section), name)
    assert run_form.defaults("training: {method: dpo}")["training.learning_rate"] == 2e-5


def test_a_field_changes_the_text_and_the_text_the_fields(client: TestClient, studio: Studio) -> None:
    data = {"settings": "# mine\r\n", "key": "lora.r", "lora.r": "8"}
    changed = client.post("/train/set", data=data).text
    assert 'data-settings="# mine\nlora:\n  r: 8\n"' in changed
    assert studio.draft.text == "# mine\nlora:\n  r: 8\n"
    checked = client.post("/train/check", data={"settings": "lora: {r: 4}\n"}).text
    assert 'name="lora.r" inputmode="decimal" value="4"' in checked
    cleared = client.post("/train/set", data={"settings": "lora: {r: 4}\n", "key": "lora.r", "lora.r": ""}).text
    assert 'data-settings="' in cleared
    assert studio.draft.text.strip() == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"key": "lora.r", "lora.r": "lots"}, "lora.r: got"),
        ({"key": "lora.r", "lora.r": "[1]"}, "wanted one number or word"),
        ({"key": "output", "output": "/etc"}, "has no field on this page"),
    ],
)
def test_wrong_values_of_fields_are_said(client: TestClient, data: dict[str, str], message: str) -> None:
    assert message in client.post("/train/set", data={"settings": "", **data}).text


def test_errors_have_lines_and_a_wrong_text_is_no_draft(client: TestClient, studio: Studio) -> None:
    text = client.post("/train/check", data={"settings": f"lora:\n  r: 0\nmodel: '{HOSTILE[:9]}'\n"}).text
    assert 'data-line="2"' in text
    assert studio.draft.text == ""
    late = client.post("/train/predict", data={"settings": "training:\n  loging_steps: 1\n"}).text
    assert 'data-line="2"' in late
    assert "did you mean &#39;logging_steps&#39;" in late


def test_the_prediction_is_the_plans(client: TestClient) -> None:
    text = client.post("/train/predict", data={"settings": "training: {max_steps: 7}\ndata: {limit: 8}\n"}).text
    assert "<dd>7</dd>" in text
    assert "fits" in text


@pytest.mark.parametrize(
    "setting",
    [
        "data: /etc/passwd",
        "data: {heldout: /etc/passwd}",
        "model: /etc",
        "model: {name: parley-demo, chat_template: /etc/passwd}",
    ],
)
def test_places_outside_are_refused_before_anything_is_read(client: TestClient, studio: Studio, setting: str) -> None:
    for path in ("/train/predict", "/train/start"):
        response = client.post(path, data={"settings": setting})
        assert "not in a folder that this studio may open" in response.text
    assert studio.queue.jobs() == []


def test_completion_knows_the_libraries_settings(client: TestClient) -> None:
    data = {"settings": "training:\n  max_gr", "line": "2", "column": "8"}
    (found,) = client.post("/train/complete", data=data).json()
    assert found["label"] == "max_grad_norm"
    assert client.post("/train/complete", data=data | {"line": "x"}).status_code == 400


def test_the_difference_to_the_last_run(client: TestClient, studio: Studio) -> None:
    config = RunConfig.create({"lora": {"r": 4}, "training": {"seed": 1}})
    write_run(studio, "first", config.to_yaml())
    changed = RunConfig.create({"lora": {"r": 8}, "training": {"seed": 1}, "output": "elsewhere"})
    assert settings_diff(changed, read_run(studio.root / "first")) == {"lora.r": (4, 8)}
    text = client.post("/train/check", data={"settings": "lora: {r: 8}\ntraining: {seed: 1}\n"}).text
    assert "<code>lora.r</code>" in text
    assert "Nothing: the same settings" in client.post("/train/check", data={"settings": config.to_yaml()}).text


def test_a_start_queues_the_text_of_its_page(
    client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(studio, "start_run", lambda text, name: started.append((text, name)) or "mine")
    wrong = client.post("/train/start", data={"settings": "lora: {r: 0}\n"})
    assert 'data-line="1"' in wrong.text
    assert started == []
    text = "training:\n  max_steps: 3\n"
    response = client.post("/train/start", data={"settings": text, "name": " mine "})
    assert response.headers["hx-redirect"] == "/train/started/mine"
    assert started == [(text, "mine")]


def test_a_run_is_shown_from_its_start_on(client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("1", "mine", ["train"])
    monkeypatch.setattr(studio.queue, "jobs", lambda: [job])
    monkeypatch.setattr(studio.queue, "log", lambda _: f"parley: error: {HOSTILE}")
    assert "Another run has the card" in client.get("/train/started/mine").text
    job.state = "running"
    assert "The model is loaded" in client.get("/train/started/mine", headers={"HX-Request": "true"}).text
    job.state = "failed"
    text = client.get("/train/started/mine").text
    assert "parley: error: &lt;img" in text
    assert client.get("/train/started/other").status_code == 400
    write_run(studio, "mine", "model: parley-demo\n")
    assert client.get("/train/started/mine", follow_redirects=False).headers["location"] == "/runs/mine"
    there = client.get("/train/started/mine", headers={"HX-Request": "true"})
    assert there.headers["hx-redirect"] == "/runs/mine"
