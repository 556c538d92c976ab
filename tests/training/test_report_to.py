"""training.report_to reaches the loggers of transformers and TRL, from YAML as from Python."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parley.config import RunConfig
from parley.errors import UsageError
from parley.pipeline import train
from parley.training.arguments import sft_config
from parley.training.check_settings import check_settings


@pytest.fixture
def yaml_file(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What be {n}?", "completion": "Arr."}) + "\n" for n in range(30)))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\n"
        f"model: {{name: {tiny_llama_folder}, device: cpu, max_seq_length: 64}}\n"
        f"data: {{source: {rows}, heldout_rows: 2}}\n"
        "training: {max_steps: 2, report_to: [tensorboard]}\n"
        "report: {from_heldout: 0}\n"
    )
    return path


def test_tensorboard_from_yaml(yaml_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    result = train(RunConfig.from_yaml(yaml_file), Console(file=io.StringIO()))
    # The evaluations before and after training are in the run as well, and nothing is in the working directory.
    assert {file.parent for file in tmp_path.rglob("events.out.tfevents.*")} == {result.folder.path / "tensorboard"}
    read = EventAccumulator(str(result.folder.path / "tensorboard"))
    read.Reload()
    tags = read.Tags()["scalars"]
    losses = [event.value for event in read.Scalars("train/loss")]
    assert losses == pytest.approx([step.loss for step in result.report.steps], rel=1e-6)
    assert {"train/learning_rate", "train/grad_norm", "train/mean_token_accuracy", "eval/loss"} <= set(tags)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_one_line_before_anything_is_loaded(
    yaml_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    config = RunConfig.from_yaml(yaml_file, [f"training.report_to=[{name}]"])
    args, _ = sft_config(config, config.output / "checkpoints", torch.device("cpu"))
    with pytest.raises(UsageError, match=f"training.report_to: .*{name}.*install") as caught:
        check_settings(config, args)
    assert "\n" not in str(caught.value)


def test_an_unknown_logger_is_refused_by_name(yaml_file: Path) -> None:
    config = RunConfig.from_yaml(yaml_file, ["training.report_to=[tensorbord]"])
    args, _ = sft_config(config, config.output / "checkpoints", torch.device("cpu"))
    with pytest.raises(UsageError, match="tensorbord"):
        check_settings(config, args)
