"""Runs that cannot begin, that diverge, or whose names and rows are unusual: the last word and the folder are right."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import parley.training.prepare_training as training_setup
from parley.config import RunConfig
from parley.errors import ModelError, RunError, UsageError
from parley.evaluation.rebuild_report import rebuild_report
from parley.pipeline import dry_run, train
from parley.training.arguments import sft_config
from parley.training.run_folder import RunFolder

QUIET = Console(quiet=True)
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", [])


def write_rows(path: Path, more: list[dict[str, Any]]) -> Path:
    lines = [{"prompt": f"What be {n}?", "completion": f"It be {2 * n}."} for n in range(30)] + more
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def configured(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def create(*overrides: str, **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_llama_folder), "device": "cpu", "max_seq_length": 64},
            "data": {"source": str(rows), "heldout_rows": 1},
            "training": {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0.01},
            "report": {"from_heldout": 0, "max_new_tokens": 4},
            "output": str(tmp_path / "runs" / "x"),
        }
        return RunConfig.create(values | sections, overrides)

    return create


# -- a run that never began leaves no folder ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.fsdp=full_shard"], "training: .*distributed"),
        (["training.torch_compile_backend=nonsense"], "torch_compile_backend nonsense: Invalid backend"),
        (["training.log_level=nonsense"], "training"),
        (["training.loss_type=nonsense"], "training.loss_type: got 'nonsense'; wanted nll or dft"),
        (["training.router_aux_loss_coef=0.1"], "training: .*Mixture-of-Experts"),
        (
            [
                "training.load_best_model_at_end=true",
                "training.eval_strategy=steps",
                "training.eval_steps=1",
                "training.save_steps=1",
                "training.metric_for_best_model=nonsense",
            ],
            "metric_for_best_model: got 'nonsense'; an evaluation gives .*eval_loss",
        ),
        (["training.optim=galore_adamw", "training.optim_target_modules=[q_proj]"], "training.optim"),
    ],
)
def test_what_only_the_trainer_finds_is_one_line_and_leaves_no_folder(
    configured: Callable[..., RunConfig], tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        train(configured(*overrides), QUIET)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    train(configured("training.save_steps=5"), QUIET)  # the corrected command is not blocked


@pytest.mark.parametrize("output", ["/proc/parley/run", "/dev/null/run"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(training_setup, "load_model", lambda section: pytest.fail("loaded"))
    with pytest.raises(RunError, match="cannot be written"):
        train(configured(f"output={output}"), QUIET)


def test_checking_the_output_leaves_nothing_and_keeps_an_empty_folder(tmp_path: Path) -> None:
    RunFolder.check_output(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    RunFolder.check_output(tmp_path)
    folder = RunFolder.create(RunConfig.create({"output": str(tmp_path / "a" / "b")}))
    folder.checkpoints.mkdir()
    folder.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    RunFolder.create(RunConfig.create({"output": str(tmp_path / "mine")})).discard()
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_ctrl_c_before_the_first_step_leaves_no_folder(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    class Interrupting(Console):
        def print(self, *objects: Any, **kwargs: Any) -> None:
            if "in use before training" in str(objects[0]):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configured(), Interrupting(quiet=True))
    assert list(tmp_path.iterdir()) == []


# -- numbers that are not finite ---------------------------------------------------------------------------------


def test_a_base_model_of_nan_is_refused_before_training(
    configured: Callable[..., RunConfig], tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    tiny_tokenizer.save_pretrained(broken)
    config = configured(f"model.name={broken}", f"output={tmp_path / 'run'}", "data.heldout_rows=0")
    with pytest.raises(ModelError, match="NaN or infinity, not numbers"):
        train(config, QUIET)
    assert not (tmp_path / "run").exists()


# -- secrets -----------------------------------------------------------------------------------------------------


def test_nothing_that_a_run_writes_holds_a_secret(configured: Callable[..., RunConfig]) -> None:
    result = train(configured(f"training.hub_token={TOKEN}", "training.save_steps=1"), QUIET)
    files = [path for path in result.folder.path.rglob("*") if path.is_file()]
    assert {"run.yaml", "report.json", "report.html", "resume_state.json", "events.jsonl"} <= {f.name for f in files}
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    report = json.loads((result.folder.path / "report.json").read_text())
    assert "learning_rate" in report["settings_yaml"]


def test_the_token_itself_reaches_the_trainer(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    args, _ = sft_config(configured(f"training.hub_token={TOKEN}"), tmp_path, torch.device("cpu"))
    for each in (args, copy.copy(args), copy.deepcopy(args)):
        assert f"Bearer {each.hub_token}" == f"Bearer {TOKEN}"
    assert TOKEN not in repr(args)
    assert pickle.loads(pickle.dumps(args)).hub_token == ""


# -- questions, names and rows -----------------------------------------------------------------------------------


def test_a_question_over_the_context_is_found_before_training(
    configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = configured(report={"questions": ["word " * 3000], "from_heldout": 0})
    for run in (lambda: dry_run(config, QUIET), lambda: train(config, QUIET)):
        with pytest.raises(UsageError, match=r"report.questions: 'word .*the model's context is 2,048"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_held_out_rows_that_cannot_be_asked_are_left_out_of_the_report(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """An empty prompt, a prompt over the context, a lone surrogate: none of them loses the report."""
    answer = [{"role": "assistant", "content": "Ahoy."}]
    odd = [
        {"prompt": [], "completion": answer},
        {"prompt": [{"role": "user", "content": "word " * 3000}], "completion": answer},
        {"prompt": [{"role": "user", "content": "So \ud83d?"}], "completion": answer},
        {"prompt": [{"role": "user", "content": "Who?"}], "completion": answer},
    ]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in odd))
    overrides = [f"data.heldout={heldout}", "report.from_heldout=4", f"output={tmp_path / 'run'}"]
    config = configured(*overrides, "data.bad_rows=skip")
    dry_run(config, QUIET)
    result = train(config, Console(file=io.StringIO(), width=100))
    assert (result.folder.path / "report.html").is_file()
    asked = [answer.question[-1].content for answer in result.report.answers]
    assert asked[-1] == "Who?"
    assert len(asked) in (1, 2)  # the surrogate is a bad row, or stands as "?"


def test_markup_and_control_characters_reach_the_terminal_as_text(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    evil = "[/z] [bold]b[/bold] :smile: \x1b[2J\x9b31m\x7f\u202e"
    data = tmp_path / "d[ata]"
    data.mkdir()
    write_rows(data / "rows[_x].jsonl", [])
    said = io.StringIO()
    config = configured(
        f"output={tmp_path / 'z[/z]'}",
        f"data.source={data / 'rows[_x].jsonl'}",
        report={"questions": [evil], "from_heldout": 0, "max_new_tokens": 2},
    )
    result = train(config, Console(file=said, width=300))
    text = said.getvalue()
    assert f"parley chat {tmp_path / 'z[/z]'}" in text
    assert "rows[_x].jsonl" in text
    assert "[/z] [bold]b[/bold] :smile: ␛[2J␡31m␡\ufffd" in text
    assert not set(text) & set("\x1b\x9b\x7f\u202e")
    assert result.report.answers[0].question[-1].content == evil  # the report keeps what was asked


def test_held_out_losses_between_steps_are_in_the_report_and_it_can_be_written_again(
    configured: Callable[..., RunConfig],
) -> None:
    config = configured("training.max_steps=3", "training.eval_strategy=steps", "training.eval_steps=2")
    result = train(config, QUIET)
    losses = [step.heldout_loss is not None for step in result.report.steps]
    assert losses == [False, True, True]  # the last is that after training
    before = (result.folder.path / "report.json").read_text()
    rebuild_report(result.folder.path, QUIET)
    assert (result.folder.path / "report.json").read_text() == before


def test_training_goes_on_from_a_checkpoint(
    configured: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = train(configured("training.max_steps=4", f"output={tmp_path / 'whole'}"), QUIET)
    steps = "training.max_steps=4"
    train(configured(steps, "training.save_steps=2", f"output={tmp_path / 'first'}"), QUIET)
    checkpoint = "~/first/checkpoints/checkpoint-2"
    again = train(
        configured(steps, f"training.resume_from_checkpoint={checkpoint}", f"output={tmp_path / 'second'}"), QUIET
    )
    assert [step.step for step in again.report.steps] == [3, 4]
    for resumed, step in zip(again.report.steps, whole.report.steps[2:], strict=True):
        assert resumed.loss == pytest.approx(step.loss, rel=1e-5)
