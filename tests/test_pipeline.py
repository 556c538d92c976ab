"""The pipeline from end to end, on a tiny model: what a run leaves behind, and that it can be trusted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from parley.config import DataSection, GenerationSection, RunConfig
from parley.data.doctor.diagnose import diagnose
from parley.errors import RunError
from parley.evaluation.evaluate_run import evaluate_run
from parley.inference.generate import generate
from parley.pipeline import RunResult, dry_run, train
from parley.training.run_summary import read_run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"instruction": f"What is {n} and {m}?", "context": "", "response": f"Arr, it be {n + m}, matey."}
        for n in range(8)
        for m in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    return path


def settings(folder: Path, rows: Path, output: Path, *overrides: str) -> RunConfig:
    values = {
        "model": {"name": str(folder), "device": "cpu", "max_seq_length": 256},
        "data": {"source": str(rows), "heldout_rows": 4, "bad_rows": "skip"},
        "training": {"max_steps": 4, "learning_rate": 0.01, "save_steps": 2},
        "report": {"questions": ["What is 1 and 1?"], "from_heldout": 1, "max_new_tokens": 4},
        "output": str(output),
    }
    return RunConfig.create(values, overrides)


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def result(
    tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory, said: io.StringIO
) -> RunResult:
    config = settings(tiny_llama_folder, rows, tmp_path_factory.mktemp("runs") / "run")
    return train(config, Console(file=said, width=120))


def test_a_run_leaves_everything_it_promises(result: RunResult) -> None:
    path = result.folder.path
    for name in ("run.yaml", "golden.json", "events.jsonl", "report.html", "report.json", "adapter", "checkpoints"):
        assert (path / name).exists(), name
    assert (path / "adapter" / "adapter_model.safetensors").is_file()
    assert (path / "adapter" / "chat_template.jinja").is_file()
    assert sorted(p.name for p in (path / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    run = read_run(path)
    assert (run.state, run.step, run.max_steps) == ("finished", 4, 4)
    assert run.heldout_loss == result.report.after.heldout_loss  # type: ignore[union-attr]
    resolved = yaml.safe_load((path / "run.yaml").read_text())
    assert resolved["training"]["max_steps"] == 4
    assert resolved["lora"]["r"] == 16


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(result: RunResult, tiny_llama_folder: Path) -> None:
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32), result.folder.adapter
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = result.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
        with plain.disable_adapter():
            assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-3


def test_answers_before_training_are_the_models_own(result: RunResult, tiny_llama_folder: Path) -> None:
    """They are asked for after training, with the adapter switched off."""
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    greedy = GenerationSection(temperature=0, min_p=0, max_new_tokens=4)
    answers = result.report.answers
    asked = [[turn.model_dump(exclude_none=True) for turn in answer.question] for answer in answers]
    assert [answer.before for answer in answers] == generate(fresh, result.tokenizer, asked, greedy)
    assert [answer.after for answer in answers] == generate(result.model, result.tokenizer, asked, greedy)
    assert all(answer.before != answer.after for answer in answers)


def test_every_step_is_in_the_events_and_the_report(result: RunResult) -> None:
    events = [json.loads(line) for line in result.folder.events.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "learning_rate", "tokens_per_s", "memory_gib", "mean_token_accuracy"):
        assert all(event[key] > 0 or key in ("learning_rate", "mean_token_accuracy") for event in steps), key
    report = json.loads((result.folder.path / "report.json").read_text())
    assert [step["loss"] for step in report["steps"]] == [event["loss"] for event in steps]
    assert report["after"]["heldout_loss"] < report["before"]["heldout_loss"]
    assert len(report["answers"]) == 2


def test_what_was_said(result: RunResult, said: io.StringIO) -> None:
    text = said.getvalue()
    for words in ("instruction", "41 rows", "optimizer: fused AdamW", "in use before training", "report.html"):
        assert words in text, words


def test_the_data_is_checked_before_training_and_the_report_has_the_findings(result: RunResult, rows: Path) -> None:
    report = json.loads((result.folder.path / "report.json").read_text())
    data = DataSection(source=str(rows), heldout_rows=4)
    assert report["diagnosis"] == diagnose(data, for_training=True).model_dump(mode="json")
    assert report["diagnosis"]["rows"] == 41
    assert 'id="data-checks"' in (result.folder.path / "report.html").read_text()


def test_training_again_gives_the_same_losses(
    result: RunResult, tiny_llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    again = train(settings(tiny_llama_folder, rows, tmp_path / "run"), Console(quiet=True))
    assert [s.loss for s in again.report.steps] == [s.loss for s in result.report.steps]


def test_a_run_is_not_overwritten(result: RunResult, tiny_llama_folder: Path, rows: Path) -> None:
    before = result.folder.config_file.read_text()
    with pytest.raises(RunError, match="already holds another run"):
        train(settings(tiny_llama_folder, rows, result.folder.path), Console(quiet=True))
    assert result.folder.config_file.read_text() == before


def test_evaluating_a_run_gives_the_figures_of_its_report(result: RunResult) -> None:
    scores = evaluate_run(result.folder.path, console=Console(quiet=True))
    assert result.report.before is not None
    assert result.report.after is not None
    assert scores["base"].heldout_loss == pytest.approx(result.report.before.heldout_loss, rel=1e-5)
    assert scores["tuned"].heldout_loss == pytest.approx(result.report.after.heldout_loss, rel=1e-5)
    assert json.loads((result.folder.path / "eval.json").read_text())["tuned"]["heldout_loss"] > 0


def test_the_saved_run_loads_again(result: RunResult) -> None:
    model, tokenizer = result.folder.load()
    golden = json.loads(result.folder.golden.read_text())
    assert tokenizer.apply_chat_template(golden[0]["messages"], return_dict=False) == golden[0]["input_ids"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)


def test_full_fine_tuning(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama_folder, rows, tmp_path / "run", "lora=null", "training.learning_rate=1e-3")
    result = train(config, Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(result.folder.model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(result.folder.model).chat_template


def test_a_dry_run_writes_nothing(tiny_llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    dry_run(settings(tiny_llama_folder, rows, tmp_path / "run"), Console(file=out, width=100))
    assert "would train 4 steps" in out.getvalue()
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_kept_beside_the_run(result: RunResult, said: io.StringIO) -> None:
    bad = json.loads(result.folder.bad_rows.read_text())
    assert bad["origin"] == "rows.jsonl line 41"
    assert "broken JSON" in bad["error"]
    assert "1 bad row skipped (rows.jsonl line 41)" in " ".join(said.getvalue().split())
