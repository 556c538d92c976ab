"""The export page: what it would take, its proof while it is made, files and commands, nothing outside of it."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from fastapi.testclient import TestClient

from parley.config import RunConfig
from parley.errors import RunError
from parley.exporting.estimate import estimate_export
from parley.exporting.export import export
from parley.studio.export_job import main
from parley.studio.exports import export_file, export_folder, zipped
from parley.studio.pages.export import GGUF_QUANTS, QUANTS, ROWS, TARGETS, commands
from parley.studio.state import Studio


@pytest.fixture(autouse=True)
def in_this_process(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    async def call(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(studio.worker, "call", call)
    monkeypatch.setattr("parley.exporting.samples.ANSWER_TOKENS", (12, 12))


@pytest.fixture(scope="module")
def trained(build_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny Llama; it is copied into each studio."""
    from parley.config import LoraSection, ModelSection
    from parley.models.adapters import attach_lora
    from parley.models.load import load_model
    from parley.training.run_folder import RunFolder

    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"What be {n} and {n}?", "completion": f"It be {2 * n}, arr."} for n in range(20)]
    rows.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    section = {"name": str(build_family("llama")), "device": "cpu"}
    output = tmp_path_factory.mktemp("runs") / "tuned"
    data = {"source": str(rows), "heldout_rows": 4}
    folder = RunFolder.create(RunConfig.create({"output": str(output), "model": section, "data": data}))
    model, tokenizer = load_model(ModelSection(**section))
    model = attach_lora(model, LoraSection(r=4), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    folder.save_weights(model, tokenizer, full=False)
    folder.unlock()
    return output


@pytest.fixture
def run(studio: Studio, trained: Path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, studio.root / "tuned"))


@pytest.mark.parametrize(
    ("target", "quant"),
    [("gguf", "q8_0"), ("gguf", "f16"), ("gguf-lora", None), ("merged", "bf16"), ("merged", None), ("adapter", None)],
)
def test_the_size_beforehand_is_that_of_the_weights(
    trained: Path, tmp_path: Path, target: str, quant: str | None
) -> None:
    found = estimate_export(trained, target, quant)
    (done,) = export(trained, target, quant or (), verify=False, output=tmp_path / "out")
    weights = {name: size for name, size in done.record.files.items() if name.endswith((".gguf", ".safetensors"))}
    overhead = 40_000  # names of tensors, vocabulary and template of the tiny model
    assert found.bytes <= sum(weights.values()) <= found.bytes + overhead
    assert found.seconds > 0


def test_the_proof_grows_while_it_is_made(trained: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def watch(stage: str, figures: Any) -> None:
        seen.append((stage, -1 if figures is None else figures.prompts + figures.tokens + figures.answers))

    export(trained, "adapter", output=tmp_path / "out", on_progress=watch)
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["measuring the trained model", "writing adapter", "comparing adapter"]
    counts = [count for stage, count in seen if stage == "comparing adapter" and count >= 0]
    assert len(counts) == 4
    assert sorted(counts) == counts
    assert counts[0] < counts[-1]


def test_a_job_writes_what_it_does_for_pages_of_any_time(
    client: TestClient, studio: Studio, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(arguments: list[str], **_: Any) -> Any:
        main(*arguments[3:])
        return type("Ended", (), {"poll": lambda self: 0})()

    monkeypatch.setattr("parley.studio.exports.subprocess.Popen", start)
    assert "no exports yet" in client.get("/export/list", params={"run": "tuned"}).text
    text = client.post("/export/start", data={"run": "tuned", "target": "gguf", "quant": "q8_0"}).text
    assert "verified" in text
    for name in ("read by", "KL divergence, mean and worst", "greedy answers the same"):
        assert name in text
    assert "llama-server --jinja --model ./" in text
    job = studio.exports.jobs("tuned")[0]
    with monkeypatch.context() as patch:  # the folder is there, and the job has not said so yet
        patch.setattr(studio.exports, "jobs", lambda _: [dataclasses.replace(job, state="running")])
        assert "verified" not in client.get("/export/list", params={"run": "tuned"}).text
    again = client.post("/export/start", data={"run": "tuned", "target": "gguf", "quant": "q8_0"})
    assert "has that export already" in again.text
    events = [json.loads(line) for line in next(studio.exports.folder.glob("*.jsonl")).read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["process", "stage"]
    assert events[-1] == {"event": "done", "name": "gguf-q8_0", "passed": True}
    rows = [len(event["rows"]) for event in events if event.get("rows")]
    assert rows == sorted(rows)
    assert len(set(rows)) > 1
    archive = client.get("/export/zip", params={"run": "tuned", "name": "gguf-q8_0"})
    with ZipFile(io.BytesIO(archive.content)) as opened:
        assert opened.testzip() is None
        assert {f"gguf-q8_0/{name}" for name in ("export.json", "README.md", "tuned-q8_0.gguf")} <= set(
            opened.namelist()
        )
    one = client.get("/export/file", params={"run": "tuned", "name": "gguf-q8_0", "file": "export.json"})
    assert one.json()["target"] == "gguf"
    assert "attachment" in one.headers["content-disposition"]


def test_errors_of_an_export_are_shown(client: TestClient, studio: Studio, run: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    studio.exports.folder.mkdir(parents=True)
    (studio.exports.folder / "1.json").write_text(json.dumps({"run_id": "tuned", "target": "adapter", "quant": ""}))
    assert main(str(run), "adapter", "", str(studio.exports.folder / "1.jsonl")) == 1
    (job,) = studio.exports.jobs("tuned")
    assert job.state == "failed"
    assert "adapter" in str(job.error)
    assert "problem" in client.get("/export/list", params={"run": "tuned"}).text
    assert "no exports yet" in client.post("/export/remove/1").text
    assert client.post("/export/remove/1").status_code == 400


def test_a_job_whose_process_is_gone_has_failed(studio: Studio) -> None:
    studio.exports.folder.mkdir(parents=True)
    (studio.exports.folder / "1.json").write_text(json.dumps({"run_id": "x", "target": "gguf", "quant": ""}))
    (studio.exports.folder / "2.json").write_text("{")
    process = {"event": "process", "pid": 1, "started": time.time()}
    (studio.exports.folder / "1.jsonl").write_text(json.dumps(process) + '\n{"event": "sta')
    (job,) = studio.exports.jobs()
    assert (job.state, job.stage) == ("failed", "starting")


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "gguf/..", "", ".", "link"])
def test_nothing_outside_of_a_runs_exports_is_sent(client: TestClient, run: Path, name: str) -> None:
    (run / "exports" / "real").mkdir(parents=True)
    (run / "exports" / "real" / "export.json").write_text("{}")
    (run / "export.json").write_text("{}")
    (run / "exports" / "link").symlink_to(run)
    with pytest.raises(RunError):
        export_folder(run, name)
    for path in ("file", "zip"):
        params = {"run": "tuned", "name": name, "file": "export.json"}
        assert client.get(f"/export/{path}", params=params).status_code == 400
    (run / "exports" / "real" / "out").symlink_to("/etc/passwd")
    for file in ("../../run.yaml", "/etc/passwd", "out", "missing", ""):
        with pytest.raises(RunError):
            export_file(export_folder(run, "real"), file)
    with ZipFile(io.BytesIO(b"".join(zipped(run / "exports" / "real")))) as opened:
        assert opened.namelist() == ["real/export.json"]


def test_the_page_offers_what_the_exporters_take() -> None:
    from parley.exporting.comparison import Figures
    from parley.exporting.registry import EXPORTERS, exporter_of
    from parley.exporting.table import figure_rows

    assert set(TARGETS) == set(EXPORTERS)
    for target in TARGETS:
        assert set(QUANTS.get(target, {})) == set(exporter_of(target).quants)
    assert exporter_of("gguf").default_quant == next(iter(GGUF_QUANTS))
    figures = Figures(program="x", source="y", prompts=1, left_out=1, tokens=1, answers=1, top1=1, mean_kl=0,
                      worst_kl=0, worst_logit=0, loss=0, loss_trained=0)  # fmt: skip
    assert {name for name, _ in figure_rows(figures)} == set(ROWS)


def test_wrong_choices_are_refused(client: TestClient, run: Path) -> None:
    for data in ({"target": "exe"}, {"target": "gguf", "quant": "q1"}, {"target": "adapter", "quant": "f16"}):
        assert client.post("/export/start", data={"run": "tuned", **data}).status_code == 400
    assert client.post("/export/start", data={"run": "../..", "target": "gguf"}).status_code == 400
    assert client.get("/export", params={"target": "<b>"}).status_code == 400
    assert (
        "on the disk" in client.get("/export/estimate", params={"run": "tuned", "target": "gguf", "quant": "q4_0"}).text
    )
    assert "Precision" not in client.get("/export/quants", params={"target": "vllm"}).text


def test_commands_are_quoted() -> None:
    place = Path("/runs/it's mine/exports/merged-bf16")
    assert commands(place, "merged-bf16", None) == [("vLLM", "vllm serve '/runs/it'\"'\"'s mine/exports/merged-bf16'")]
    assert commands(Path("/r/gguf-q8_0"), "gguf-q8_0", "llama-server x")[0] == (
        "llama.cpp",
        "cd /r/gguf-q8_0 && llama-server x",
    )
