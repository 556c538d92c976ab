"""Run folders that somebody else made, or that broke: one clear line, nothing executed, nothing written outside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from parley.config import RunConfig
from parley.errors import RunError
from parley.evaluation.evaluate_run import evaluate_run
from parley.evaluation.rebuild_report import rebuild_report
from parley.serving.loading import load_for_inference
from parley.training.run_folder import RunFolder

Outcome = Callable[..., str | None]


@pytest.fixture(scope="module")
def good_run(tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an adapter, its rows beside it; copy it before changing it."""
    home = tmp_path_factory.mktemp("runs")
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}."}) + "\n" for n in range(20)))
    config = RunConfig.create(
        {
            "output": str(home / "run"),
            "model": {"name": str(tiny_llama_folder), "device": "cpu"},
            "data": {"source": str(rows), "heldout_rows": 2},
        }
    )
    folder = RunFolder.create(config)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), lora)
    folder.save_weights(model, tiny_tokenizer, full=False)
    folder.events.write_text(EVENTS)
    return folder.path


@pytest.fixture
def run(good_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_run, tmp_path / "run"))


EVENTS = (
    '{"event": "start", "step": 0, "max_steps": 2}\n'
    '{"event": "eval", "step": 0, "eval_loss": 5.5}\n'
    '{"event": "step", "step": 1, "loss": 5.0, "learning_rate": 0.1, "mean_token_accuracy": 0.25}\n'
    '{"event": "step", "step": 2, "loss": 4.0, "learning_rate": 0.1}\n'
    '{"event": "eval", "step": 2, "eval_loss": 4.5}\n'
)
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
NOT_SETTINGS: dict[str, bytes] = {
    "list": b"- 1\n- 2\n",
    "string": b"hello",
    "number": b"7",
    "bool": b"true",
    "date": b"2024-01-01",
    "bad date": b"a: 2024-13-45",
    "open bracket": b"model: [",
    "open brace": b"{" * 1000,
    "tabs": b"\tmodel: x",
    "binary": bytes(range(256)),
    "utf-16": "model: x".encode("utf-16"),
    "nul": b"model: \0",
    "escape": b"model: \x1b[2J",
    "two documents": b"model: a\n---\nmodel: b\n",
    "twice the same key": b"model: a\nmodel: b\n",
    "deep list": b"[" * 50_000,
    "deep map": b"a: " * 3 + b"{a: " * 20_000,
    "deep indentation": b"".join(b" " * n + b"a:\n" for n in range(400)),
    "billion laughs": LAUGHS.encode(),
    "endless alias": b"a: &a [*a]",
    "alias of nothing": b"a: *b",
    "merge of a number": b"<<: 3",
    "python object": b"!!python/object/apply:os.system ['touch /tmp/parley-was-here']",
    "python name": b"model: !!python/name:os.system",
    "own tag": b"model: !x y",
    "int tag": b"model: !!int x",
    "megabytes": b"#" * 2_000_000,
    "many values": b"- 1\n" * 60_000,
    "long number": b"a: " + b"9" * 10_000,
    "unhashable key": b"? [a]\n: b",
    "number as key": b"1: 2",
    "unknown key": b"modle: x",
    "long key": b"x" * 100_000 + b": 1",
    "model is a list": b"model: [1]",
    "model is a number": b"model: 3",
    "model is null": b"model: null",
    "no name": b"model: {name: null}",
    "name is a list": b"model: {name: [a]}",
    "empty name": b"model: {name: ''}",
    "name with nul": b'model: {name: "a\\0b"}',
    "name with a surrogate": b'model: {name: "\\ud83d"}',
    "long name": b"model: {name: " + b"x" * 5000 + b"}",
    "long path": b"model: {name: /" + b"x/" * 5000 + b"}",
    "unknown user": b"model: {name: ~no-such-user/x}",
    "dtype": b"model: {dtype: float7}",
    "infinite": b"training: {learning_rate: .inf}",
    "nan": b"training: {learning_rate: .nan}",
    "seed": b"training: {seed: -1}",
    "rank": b"lora: {r: 10000000000000}",
    "data is a list": b"data: [1]",
    "columns are a list": b"data: {columns: [a]}",
    "generation": b"generation: {temperature: hot}",
    "stop": b"generation: {stop: 3}",
    "report": b"report: 3",
    "output": b"output: [1]",
}


@pytest.mark.parametrize("content", NOT_SETTINGS.values(), ids=NOT_SETTINGS)
def test_a_run_yaml_that_is_not_settings(tmp_path: Path, outcome_of: Outcome, content: bytes) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.yaml").write_bytes(content)
    for command in (load_for_inference, evaluate_run, rebuild_report):
        line = outcome_of(lambda command=command: command(tmp_path))
        assert line is not None
        assert str(tmp_path) in line
    assert not Path("/tmp/parley-was-here").exists()


def _changed(run: Path, **model: Any) -> None:
    values = yaml.safe_load((run / "run.yaml").read_text())
    values["model"] |= model
    (run / "run.yaml").write_text(yaml.safe_dump(values))


BASES: dict[str, dict[str, Any]] = {
    "gone": {"name": "/no/such/folder", "name_from_run": "../nothing"},
    "gone, absolute alone": {"name": "/no/such/folder", "name_from_run": None},
    "relative": {"name": "./no-such-folder", "name_from_run": None},
    "a file": {"name": "/etc/hostname", "name_from_run": None},
    "a device": {"name": "/dev/zero", "name_from_run": "/dev/zero"},
    "the root": {"name": "/", "name_from_run": "/"},
    "an empty folder": {"name": "/proc/self/fdinfo", "name_from_run": None},
}


@pytest.mark.parametrize("model", BASES.values(), ids=BASES)
def test_a_base_that_is_not_there(run: Path, outcome_of: Outcome, model: dict[str, Any], no_hub: None) -> None:
    _changed(run, **model)
    assert outcome_of(lambda: load_for_inference(str(run))) is not None


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any request to the hub fails the test."""

    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr("parley.models.resolve.snapshot_download", asked)


def test_a_run_with_a_relative_model_path_opens_from_anywhere(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    """Recorded absolutely and relative to the run: found from another folder, and after a move of both."""
    home = tmp_path / "home"
    shutil.copytree(tiny_llama_folder, home / "models" / "tiny")
    monkeypatch.chdir(home)
    folder = RunFolder.create(RunConfig.create({"model": {"name": "models/tiny", "device": "cpu"}, "output": "runs/x"}))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "models" / "tiny"), lora)
    folder.save_weights(model, tiny_tokenizer, full=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_for_inference(str(home / "runs" / "x"))
    assert loaded.names == {"x": False, "tiny": True}

    moved = tmp_path / "moved"
    home.rename(moved)
    assert RunFolder.open(moved / "runs" / "x").base_name() == str(moved / "runs/x/../../models/tiny")
    load_for_inference(str(moved / "runs" / "x"))

    shutil.rmtree(moved / "models")
    with pytest.raises(RunError, match=r"its base model is neither at .*/home/models/tiny nor at .*; put it there"):
        load_for_inference(str(moved / "runs" / "x"))


def test_relative_data_is_recorded_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    Path("more.jsonl").write_text("{}\n")
    config = RunConfig.create({"data": {"source": "rows.jsonl", "heldout": "more.jsonl#train"}, "output": "run"})
    written = RunFolder.create(config)._read_config()
    assert written.data.source == str(tmp_path / "rows.jsonl")
    assert written.data.heldout == f"{tmp_path / 'more.jsonl'}#train"
    assert written.model.name == "parley-demo"
    assert config.data.source == "rows.jsonl"


# -- a stranger's folder is data ---------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).write_text("executed")
class EvilConfig(PretrainedConfig):
    model_type = "evil"
"""


@pytest.mark.parametrize("command", [load_for_inference, evaluate_run], ids=["chat, generate, serve", "eval"])
def test_opening_a_run_executes_no_code_that_its_settings_ask_for(
    run: Path, tmp_path: Path, outcome_of: Outcome, caplog: pytest.LogCaptureFixture, command: Any
) -> None:
    marker = tmp_path / "executed"
    base = run / "base"
    base.mkdir()
    (base / "evil.py").write_text(CODE.format(marker=str(marker)))
    (base / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}))
    _changed(run, name=str(base), name_from_run="base", trust_remote_code=True)
    source = str(run) if command is load_for_inference else run
    with caplog.at_level("WARNING", logger="parley"):
        assert outcome_of(lambda: command(source)) is not None
    assert not marker.exists()
    assert "trust_remote_code of run.yaml is ignored" in caplog.text
    assert outcome_of(lambda: command(source, trust_remote_code=True)) is not None  # it has no weights
    assert marker.exists()


def test_run_yaml_decides_nothing_of_an_evaluation_but_batch_and_precision(run: Path) -> None:
    values = yaml.safe_load((run / "run.yaml").read_text())
    values["training"] |= {"report_to": "wandb", "push_to_hub": True, "deepspeed": "/no/such", "optim": "nonsense"}
    (run / "run.yaml").write_text(yaml.safe_dump(values))
    assert evaluate_run(run, console=Console(quiet=True))["tuned"].heldout_loss is not None


@pytest.mark.parametrize("name", ["eval.json", "report.json", "report.html"])
def test_links_out_of_the_folder_are_not_written_through(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    if name == "eval.json":
        evaluate_run(run, console=Console(quiet=True))
    else:
        rebuild_report(run, Console(quiet=True))
    assert outside.read_text() == "mine"
    assert not (run / name).is_symlink()


# -- files that are broken or missing ----------------------------------------------------------------------------

CONTENTS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "binary": bytes(range(256)),
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "null": b"null\n",
    "half": b'{"event": "step", "st',
    "deep": b"[" * 100_000,
    "huge number": b'{"event": "step", "step": ' + b"9" * 5000 + b"}",
    "wrong types": b'{"event": "step", "step": "x", "loss": [], "title": 3, "steps": 4}\n',
    "nan": b'{"event": "step", "step": 1, "loss": NaN}\n',
    "surrogate": b'{"event": "step", "step": 1, "title": "\\ud83d"}\n',
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", ["events.jsonl", "report.json"])
def test_the_report_is_rebuilt_from_what_is_whole(
    run: Path, outcome_of: Outcome, name: str, content: bytes | None
) -> None:
    rebuild_report(run, Console(quiet=True))
    (run / "report.html").unlink()
    _write(run / name, content)
    assert outcome_of(lambda: rebuild_report(run, Console(quiet=True))) is None
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "5.5" in page
    assert len(json.loads((run / "report.json").read_text())["steps"]) == 2


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_run_with_nothing_to_report_is_one_line(run: Path, outcome_of: Outcome, content: bytes | None) -> None:
    for name in ("events.jsonl", "report.json"):
        _write(run / name, content)
    line = outcome_of(lambda: rebuild_report(run, Console(quiet=True)))
    assert line is None or "anything to report" in line


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_broken_files_of_the_adapter(run: Path, outcome_of: Outcome, name: str, content: bytes | None) -> None:
    _write(run / "adapter" / name, content)
    line = outcome_of(lambda: load_for_inference(str(run)))
    assert line is not None or name == "tokenizer_config.json"


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def test_places_that_are_no_run(tmp_path: Path, outcome_of: Outcome) -> None:
    fifo = tmp_path / "fifo"
    fifo.mkdir()
    os.mkfifo(fifo / "run.yaml")
    device = tmp_path / "device"
    device.mkdir()
    (device / "run.yaml").symlink_to("/dev/zero")
    loop = tmp_path / "loop"
    loop.mkdir()
    (loop / "run.yaml").symlink_to(loop / "run.yaml")
    names = ("x" * 5000, "a\0b", "~nobody-here/x", "\ud83d", "")
    for path in (fifo, device, loop, tmp_path, tmp_path / "nothing", *map(Path, names)):
        assert outcome_of(lambda path=path: RunFolder.open(path)) is not None
        assert outcome_of(lambda path=path: rebuild_report(path)) is not None


def test_parley_report_writes_the_page_of_a_run_that_died(run: Path, outcome_of_command: Outcome) -> None:
    shutil.rmtree(run / "adapter")  # it never got to saving
    (run / "events.jsonl").write_text(EVENTS + '{"event": "step", "step": 3, "lo')
    assert outcome_of_command("report", run) is None
    report = json.loads((run / "report.json").read_text())
    assert [step["loss"] for step in report["steps"]] == [5.0, 4.0]
    assert report["steps"][0]["token_accuracy"] == 0.25
    assert report["steps"][1]["heldout_loss"] == 4.5
    assert (report["before"]["heldout_loss"], report["after"]["heldout_loss"]) == (5.5, 4.5)
    assert "heldout_rows: 2" in report["settings_yaml"]
    assert (run / "report.html").is_file()
