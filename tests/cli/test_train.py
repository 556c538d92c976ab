from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parley import pipeline
from parley.cli.train import run_config
from parley.training.run_folder import RunFolder
from parley.training.signals import StopRequested


@pytest.fixture
def settings(tmp_path: Path, tiny_llama_folder: Path, rows: Path) -> Path:
    """A YAML file for two steps on the tiny model."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
output: {tmp_path / "run"}
model: {{name: {tiny_llama_folder}, device: cpu}}
data: {{source: {rows}, heldout_rows: 2}}
training: {{max_steps: 2}}
report: {{from_heldout: 1, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return path


def test_options_win_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: one\ndata: {source: one, limit: 3}\noutput: one\n", encoding="utf-8")
    config = run_config(path, ["data.source=three", "training.max_steps=7"], "two: model", "two", Path("two"))
    assert (config.model.name, config.data.source, str(config.output)) == ("two: model", "three", "two")
    assert (config.data.limit, config.training.max_steps) == (3, 7)


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    parley: Callable[..., Any], settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    ended = parley("train", settings, "--dry-run")
    assert ended.code == 0, ended.err
    assert "Dolly" in ended.out
    assert "It be 2, arr.<|eot_id|>" in ended.out
    assert "2 steps" in ended.out
    assert set(tmp_path.rglob("*")) == before


def test_a_yaml_file_becomes_a_run(parley_process: Callable[..., Any], settings: Path, tmp_path: Path) -> None:
    ended = parley_process("train", settings)
    assert ended.code == 0, ended.err
    assert ended.err == ""  # nothing from the libraries below
    assert f"parley chat {tmp_path / 'run'}" in ended.out
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["after"]["heldout_loss"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--model", "./absent"], "absent"),
        (["--set", "lora.target_modules=[nothing_proj]"], "nothing_proj"),
        pytest.param(
            ["--set", "model.device=cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    parley: Callable[..., Any], settings: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    ended = parley("train", settings, *options)
    assert ended.code == 1
    assert ended.err.startswith("parley: error: ")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_output_folder_is_not_touched(parley: Callable[..., Any], settings: Path, run: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    ended = parley("train", settings, "--output", run.path)
    assert ended.code == 1
    assert "choose another with --output" in ended.err
    assert ended.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (StopRequested(signal.SIGTERM), 143)])
def test_a_stop_at_once_says_what_is_kept(
    parley: Callable[..., Any],
    settings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
    stop: BaseException,
    code: int,
) -> None:
    def interrupted(config: Any, console: Any, resume: Any) -> None:
        if begun:
            RunFolder.create(config).unlock()
        raise stop

    monkeypatch.setattr(pipeline, "train", interrupted)
    ended = parley("train", settings)
    assert ended.code == code
    kept = f"no checkpoint was written yet; to continue: parley train --resume {tmp_path / 'run'}"
    assert ended.err == f"parley: stopped; {kept if begun else 'nothing was written'}\n"


def test_a_signal_while_checkpoints_are_verified_still_says_how_to_continue(
    parley: Callable[..., Any], settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any, console: Any, resume: Any) -> None:
        RunFolder.create(config).unlock()
        raise KeyboardInterrupt

    def verified(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", interrupted)
    monkeypatch.setattr("parley.training.checkpoint.newest_whole", verified)
    ended = parley("train", settings)
    assert ended.code == 130
    assert ended.err == f"parley: stopped; to continue: parley train --resume {tmp_path / 'run'}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "x"], "leave --model out"),
        (["--output", "x"], "leave --output out"),
        (["--dry-run"], "leave --dry-run out"),
        (["--set", "training.learning_rate=1"], "training.learning_rate was 0.0002 and cannot become 1.0"),
        (["--set", "model.max_seq_length=99"], "model.max_seq_length was 2048 and cannot become 99"),
        (["--set", "lora.r=2"], "lora.r was 16 and cannot become 2"),
        (["--set", "data.system=X"], "data.system was None and cannot become X"),
    ],
)
def test_what_a_resumed_run_cannot_be_given(
    parley: Callable[..., Any], run: Any, options: list[str], said: str
) -> None:
    ended = parley("train", "--resume", run.path, *options)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_resuming_what_is_no_run_is_one_line(parley: Callable[..., Any], tmp_path: Path) -> None:
    ended = parley("train", "--resume", tmp_path / "absent")
    assert ended.code == 1
    assert "no run there" in ended.err


def test_resuming_prints_nothing_of_the_libraries(parley_process: Callable[..., Any], tmp_path: Path) -> None:
    """bitsandbytes warns at its import of kernels that are not used: in a process of its own, as it does so once."""
    ended = parley_process("train", "--resume", tmp_path / "absent")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("parley: error: ")
    assert ended.err.count("\n") == 1
