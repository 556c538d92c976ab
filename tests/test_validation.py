"""Held-out loss during training: from the settings to the saved adapter, the event log, the terminal and the report."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from parley.config import RunConfig, TrainingSection
from parley.errors import UsageError
from parley.evaluation.rebuild_report import rebuild_report
from parley.pipeline import RunResult, dry_run, train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"What be {n}?", "completion": f"It be {2 * n}."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def configured(tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    def create(*overrides: str) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout": "20%"},
            "training": {"max_steps": 6, "warmup_steps": 0, "learning_rate": 0.01, "save_steps": 3},
            "report": {"from_heldout": 2, "max_new_tokens": 4, "during_training": 1},
            "output": str(tmp_path_factory.mktemp("runs") / "run"),
        }
        return RunConfig.create(values, overrides)

    return create


def events_of(result: RunResult, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (result.folder.path / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def adapter_of(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def evaluated(configured: Callable[..., Any], said: io.StringIO) -> RunResult:
    return train(configured("training.eval_steps=2", "training.logging_steps=3"), Console(file=said, width=120))


def test_one_switch_gives_held_out_loss_in_the_log_the_terminal_and_the_report(
    evaluated: RunResult, said: io.StringIO
) -> None:
    losses = {event["step"]: event["eval_loss"] for event in events_of(evaluated, "eval")}
    assert list(losses) == [0, 2, 4, 6]
    lines = re.findall(r"step (\d)/6 · held-out loss (\S+) · the lowest so far", said.getvalue())
    assert lines == [(str(step), f"{losses[step]:.3f}") for step in (2, 4, 6)]
    assert f"loss {evaluated.report.steps[-1].loss:.3f} · held-out {losses[4]:.3f} ·" in said.getvalue()
    # Also of steps that are not logged: every third is.
    report = json.loads((evaluated.folder.path / "report.json").read_text())
    curve = [(step["step"], step["heldout_loss"]) for step in report["steps"]]
    assert curve == [(2, losses[2]), (3, None), (4, losses[4]), (6, losses[6])]
    assert report["after"]["heldout_loss"] == pytest.approx(losses[6], rel=1e-6)


def test_questions_are_answered_at_each_evaluation(evaluated: RunResult) -> None:
    events = events_of(evaluated, "answers")
    assert [event["step"] for event in events] == [2, 4, 6]
    first, second = evaluated.report.answers
    assert [(each.step, [each.text]) for each in first.during] == [(e["step"], e["answers"]) for e in events]
    assert first.during[-1].text == first.after  # the adapter of that moment is the final one
    assert first.during[0].text != first.after  # and before, it was another
    assert second.during == []  # report.during_training: 1


def test_the_report_can_be_written_again(evaluated: RunResult) -> None:
    before = (evaluated.folder.path / "report.json").read_text()
    rebuild_report(evaluated.folder.path, QUIET)
    assert (evaluated.folder.path / "report.json").read_text() == before
    report = json.loads(before)
    report["answers"][0]["during"], report["steps"] = [], []  # as of a run that was killed
    (evaluated.folder.path / "report.json").write_text(json.dumps(report))
    rebuild_report(evaluated.folder.path, QUIET)
    assert json.loads((evaluated.folder.path / "report.json").read_text()) == json.loads(before)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_losses_with_evaluation_are_those_without(configured: Callable[..., Any], engine: str) -> None:
    """Dropout and the order of the second epoch read the random states."""
    common = [f"training.engine={engine}", "training.max_steps=8", "lora.lora_dropout=0.1"]
    runs = [train(configured(*common, *more), QUIET) for more in ([], ["training.eval_steps=1"])]
    losses = [[event["loss"] for event in events_of(run, "step")] for run in runs]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    tensors = [adapter_of(run) for run in runs]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.fixture(scope="module")
def other_answers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Held-out rows that training makes less likely at first."""
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Who {n}?", "completion": "zqxj" * 8}) + "\n" for n in range(4)))
    return f"data.heldout={path}"


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_best_weights_are_kept_and_early_stopping_ends_the_run(
    configured: Callable[..., Any], other_answers: str, engine: str
) -> None:
    said = io.StringIO()
    harmful = [other_answers, "training.eval_steps=1", "training.learning_rate=0.05", f"training.engine={engine}"]
    stopping = "training.early_stopping={patience: 2, min_delta: 0.01}"
    result = train(configured(*harmful, stopping), Console(file=said, width=200))
    losses = {event["step"]: event["eval_loss"] for event in events_of(result, "eval")[1:-1]}
    assert list(losses) == [1, 2, 3]
    assert losses[1] < min(losses[2], losses[3])
    text = " ".join(said.getvalue().split())
    assert "stopped early at step 3: held-out loss has not fallen by more than 0.01 in 2 evaluations" in text
    kept = f"kept the weights of step 1: held-out loss {losses[1]:.4g} is the lowest of 3 evaluations"
    assert kept in text
    assert any(kept in note for note in result.report.notes)
    assert result.report.kept_step == 1
    assert result.report.after is not None
    assert result.report.after.heldout_loss == losses[1]
    assert events_of(result, "eval")[-1]["step"] == 1  # measured once more, after training
    # The saved adapter is the one that a run of one step ends with.
    saved, wanted = adapter_of(result), adapter_of(train(configured(*harmful, "training.max_steps=1"), QUIET))
    assert all(torch.equal(saved[name], wanted[name]) for name in saved)


def test_the_last_weights_are_kept_unless_asked_otherwise(configured: Callable[..., Any], other_answers: str) -> None:
    keeping = ["training.keep=last", "training.early_stopping.patience=1"]
    result = train(configured(other_answers, "training.eval_steps=1", "training.learning_rate=0.05", *keeping), QUIET)
    losses = {event["step"]: event["eval_loss"] for event in events_of(result, "eval")}
    assert list(losses) == [0, 1, 2]
    assert result.report.kept_step is None
    assert result.report.after is not None
    assert result.report.after.heldout_loss == losses[2]
    assert not result.folder.best.exists()


@pytest.mark.parametrize(("settings", "best"), [({}, False), ({"keep": "best"}, True), ({"early_stopping": {}}, True)])
def test_what_is_kept_without_being_asked(settings: dict[str, Any], best: bool) -> None:
    assert TrainingSection(**settings).keeps_best == best


def test_a_last_step_between_two_evaluations_is_evaluated_too(configured: Callable[..., Any]) -> None:
    result = train(configured("training.eval_steps=2", "training.max_steps=3", "training.keep=best"), QUIET)
    assert [event["step"] for event in events_of(result, "eval")] == [0, 2, 3, 3]
    assert result.report.kept_step is None
    assert any("kept the weights of step 3, the last one" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.early_stopping.patience=2"], r"training\.early_stopping: needs held-out loss .*eval_steps"),
        (["training.keep=best"], r"training\.keep: needs held-out loss .*eval_steps"),
        (["training.keep=first"], r"training\.keep: got 'first'"),
        (["training.early_stopping.patience=0", "training.eval_steps=1"], r"early_stopping\.patience: got 0"),
        (["training.early_stopping.min_delta=-1", "training.eval_steps=1"], r"early_stopping\.min_delta: got -1"),
        (["training.early_stopping.patiense=2"], r"unknown key 'training\.early_stopping\.patiense'.*'patience'"),
        (["training.eval_steps=0"], r"training\.eval_steps: got 0"),
        (
            ["training.eval_steps=2", "data.heldout=null", "data.heldout_rows=0"],
            r"training\.eval_steps: .*held-out rows",
        ),
        (
            ["training.eval_steps=3", "training.keep=best", "training.load_best_model_at_end=true"],
            r"load_best_model_at_end: chooses the weights, as training\.keep does",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    configured: Callable[..., Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        dry_run(configured(*overrides), QUIET)
