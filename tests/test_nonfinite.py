"""Numbers that go wrong in a run: caught on their step, not applied, named; exit code 1, the last good weights kept."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

import parley.pipeline
from parley.cli.main import app
from parley.config import RunConfig
from parley.errors import TrainingError
from parley.evaluation.rebuild_report import rebuild_report
from parley.pipeline import train
from parley.training.run_folder import RunFolder

QUIET = Console(quiet=True)
POISON = "zzz"
"""A text whose first token is in one row alone, and whose embedding the `poisoned` fixture makes NaN."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"What be {n}?", "completion": f"It be {2 * n}."} for n in range(24)]
    lines[13]["completion"] = POISON
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def configured(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def create(*overrides: str) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout_rows": 0},
            "training": {"max_steps": 6, "warmup_steps": 0, "learning_rate": 0.01, "gradient_accumulation_steps": 2},
            "report": {"from_heldout": 0, "max_new_tokens": 4},
            "output": str(tmp_path / "run"),
        }
        return RunConfig.create(values, overrides)

    return create


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Let the trainer of a run have a further callback."""
    build_trainer = parley.pipeline.build_trainer

    def build(setup: Any, args: Any, callbacks: list[Any], signals: Any, make: Any) -> Any:
        return build_trainer(setup, args, [*callbacks, callback], signals, make)

    monkeypatch.setattr(parley.pipeline, "build_trainer", build)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    """From the first step on, a pass over the row with POISON gives NaN, as an overflow in one row would."""
    token = tiny_tokenizer(POISON, add_special_tokens=False)["input_ids"][0]

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = float("nan")

    add_callback(monkeypatch, Poison())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """JSON lines, of standard JSON: without bare NaN."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{path}: {constant}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def failed(config: RunConfig) -> tuple[TrainingError, Path, str]:
    said = io.StringIO()
    with pytest.raises(TrainingError) as caught:
        train(config, Console(file=said, width=400))
    return caught.value, config.output, said.getvalue()


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_row_that_gives_nan_ends_the_run_with_the_weights_before_it(
    configured: Callable[..., RunConfig], poisoned: None, engine: str, tmp_path: Path
) -> None:
    error, run, said = failed(configured(f"training.engine={engine}"))
    assert error.exit_code == 1
    (step,) = {line["step"] for line in lines_of(run / "nonfinite.jsonl")}
    message = str(error)
    assert f"training stopped at step {step}: the loss is not finite; its update was not applied" in message
    assert f"the weights of step {step - 1}, the last good ones, are in {run / 'adapter'}" in message
    assert "training.nonfinite: skip" in message
    # The rows of the batch, with their origin and their text.
    named = lines_of(run / "nonfinite.jsonl")
    assert len(named) == 4
    (line,) = [line for line in named if line["origin"] == f"{tmp_rows(named)} line 14"]
    assert POISON in line["text"]
    assert line["loss"] == "NaN"
    # What is saved is what a run of one step less has learned: the update was not applied.
    assert step > 1
    wanted = configured(f"training.engine={engine}", f"training.max_steps={step - 1}", f"output={tmp_path / 'short'}")
    wanted.training.lr_scheduler_type = "constant"
    constant = configured(
        f"training.engine={engine}", "training.lr_scheduler_type=constant", f"output={tmp_path / 'again'}"
    )
    failed(constant)
    train(wanted, QUIET)
    assert_same(adapter_of(tmp_path / "again"), adapter_of(tmp_path / "short"))
    RunFolder.open(run).load()  # it can be used
    assert_nothing_promises_success(run, said)


def tmp_rows(named: list[dict[str, Any]]) -> str:
    return named[0]["origin"].rpartition(" line ")[0]


def assert_nothing_promises_success(run: Path, said: str) -> None:
    assert "next:" not in said
    assert "before and after training" not in said
    report = json.loads((run / "report.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert report["next_commands"] == []
    assert "training stopped" in report["notes"][-1]
    assert report["after"] is None
    (fault,) = report["step_faults"]
    assert (fault["kind"], fault["loss"]) == ("nonfinite", "NaN")
    assert [row["loss"] for row in report["steps"]][-1] == "NaN"
    events = lines_of(run / "events.jsonl")
    kinds = [event["event"] for event in events if event["event"] != "weights"]  # which names what was saved
    assert kinds[-2:] == ["nonfinite", "failed"]
    assert "end" not in [event["event"] for event in events]
    assert "not finite" in (run / "report.html").read_text()
    before = (run / "report.json").read_text()
    rebuild_report(run, QUIET)
    assert (run / "report.json").read_text() == before


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("logging_steps", [1, 4])
def test_skipping_leaves_the_step_out_and_says_so(
    configured: Callable[..., RunConfig], poisoned: None, engine: str, logging_steps: int
) -> None:
    said = io.StringIO()
    overrides = ["training.nonfinite=skip", f"training.engine={engine}", f"training.logging_steps={logging_steps}"]
    result = train(configured(*overrides, "training.save_steps=6"), Console(file=said, width=300))
    run = result.folder.path
    (step,) = {line["step"] for line in lines_of(run / "nonfinite.jsonl")}
    assert f"step {step}: the loss is not finite, so that its update is not applied" in said.getvalue()
    assert any(f"step {step}" in note for note in result.report.notes)
    events = lines_of(run / "events.jsonl")
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    for file in [*run.glob("*.json"), *checkpoint.glob("*.json")]:
        json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    steps = [event for event in events if event["event"] == "step"]
    if logging_steps == 1:
        assert [event["step"] for event in steps if "loss" not in event] == [step]
    losses = [event["loss"] for event in steps if "loss" in event]
    assert all(1 < loss < 7 for loss in losses)  # the mean of the steps that were applied, not of fewer
    assert math.isfinite(events[-1].get("train_loss", 0.0))
    assert all(bool(value.isfinite().all()) for value in adapter_of(run).values())


def test_more_skipped_steps_than_the_limit_end_the_run(configured: Callable[..., RunConfig], poisoned: None) -> None:
    overrides = ["training.nonfinite=skip", "training.nonfinite_limit=1", "training.max_steps=18"]
    error, run, _ = failed(configured(*overrides))
    assert "(after 1 skipped step, training.nonfinite_limit)" in str(error)
    assert len({line["step"] for line in lines_of(run / "nonfinite.jsonl")}) == 2


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_a_learning_rate_of_1e30_keeps_the_weights_before_it(
    configured: Callable[..., RunConfig], engine: str, tmp_path: Path
) -> None:
    overrides = [f"training.engine={engine}", "training.learning_rate=1e30", "training.save_steps=1"]
    error, run, _ = failed(configured(*overrides, "training.logging_steps=1"))
    assert error.exit_code == 1
    assert re.search(r"stopped at step 2: .*not finite", str(error))
    assert "the weights of step 0 (untrained), the last good ones" in str(error)
    assert "lower training.learning_rate (1e+30)" in str(error)
    assert all(not value.any() for name, value in adapter_of(run).items() if "lora_B" in name)
    model, _ = RunFolder.open(run).load()
    assert bool(model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all())
    lines_of(run / "events.jsonl")


def test_a_last_step_that_ruins_the_weights_is_found_too(configured: Callable[..., RunConfig]) -> None:
    error, run, _ = failed(configured("training.learning_rate=1e30", "training.max_steps=1"))
    assert "training diverged: after step 1 the logits of the first row are not finite" in str(error)
    assert "the weights of step 0 (untrained)" in str(error)
    assert all(not value.any() for name, value in adapter_of(run).items() if "lora_B" in name)


def test_the_best_weights_are_kept_where_that_was_asked(configured: Callable[..., RunConfig], poisoned: None) -> None:
    overrides = ["training.keep=best", "training.eval_steps=1", "data.heldout_rows=1", "training.seed=1"]
    error, _, _ = failed(configured(*overrides))
    found = re.search(r"stopped at step (\d)", str(error))
    assert found, error
    assert int(found[1]) > 1
    assert f"the weights of step {int(found[1]) - 1}, the last good ones" in str(error)


def test_the_command_exits_with_1(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = configured("training.learning_rate=1e30")
    settings = tmp_path / "run.yaml"
    settings.write_text(config.to_yaml())
    result = CliRunner().invoke(app, ["train", str(settings)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("logging_steps", [1, 7])
def test_a_loss_spike_is_in_the_log_and_the_report_with_its_rows(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    class Spike(TrainerCallback):
        head = torch.empty(0)

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 12:
                self.head = model.get_output_embeddings().weight.data.clone()
                model.get_output_embeddings().weight.data.mul_(100)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 12:
                model.get_output_embeddings().weight.data.copy_(self.head)

    add_callback(monkeypatch, Spike())
    overrides = ["training.max_steps=14", "training.learning_rate=1e-4", f"training.logging_steps={logging_steps}"]
    result = train(configured(*overrides), QUIET)
    (event,) = [event for event in lines_of(result.folder.events) if event["event"] == "spike"]
    (fault,) = result.report.step_faults
    assert event["step"] == fault.step == 13
    assert fault.kind == "spike"
    assert fault.loss > 2 * fault.typical
    assert len(fault.rows) == 4
    assert all(re.fullmatch(r"rows\.jsonl line \d+", row) for row in fault.rows)
    assert "Steps to look at" in (result.folder.path / "report.html").read_text()


def test_a_run_that_stopped_is_resumed_without_the_step(configured: Callable[..., RunConfig], poisoned: None) -> None:
    config = configured("training.save_steps=1")
    error, run, _ = failed(config)
    assert f"parley train --resume {run} --set training.nonfinite=skip" in str(error)
    (stopped_at,) = {line["step"] for line in lines_of(run / "nonfinite.jsonl")}
    assert stopped_at > 1
    config = RunFolder.existing(run).config
    config.training.nonfinite = "skip"
    result = train(config, QUIET, resume=run)
    assert {line["step"] for line in lines_of(run / "nonfinite.jsonl")} == {stopped_at}
    assert len(lines_of(run / "nonfinite.jsonl")) == 4  # not twice
    assert [fault.step for fault in result.report.step_faults] == [stopped_at]
    assert result.report.after is not None
