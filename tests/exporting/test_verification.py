"""An export that is not the trained model fails the comparison, and says where first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import parley
from parley.errors import DeviceError
from parley.exporting import comparison, merge, samples
from parley.exporting.comparison import Marks
from parley.exporting.export import Export
from parley.exporting.registry import exporter_of
from parley.exporting.samples import verification_samples
from parley.exporting.trained_model import open_run
from parley.training.report import Report, write_report

WITH_TOOLS = """{{- bos_token }}{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


def exported(run: Path, to: str, quant: str, tmp_path: Path) -> Export:
    (done,) = parley.export(run, to, quant, output=tmp_path / "out")
    return done


def failure(done: Export) -> str:
    assert done.record.status == "failed"
    assert not done.passed
    assert done.record.figures is not None
    assert done.record.figures.failure is not None
    assert "**UNVERIFIED**" in (done.folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((done.folder / "export.json").read_text())["status"] == "failed"
    return done.record.figures.failure


def test_rows_that_are_not_permuted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley.exporting.gguf.architectures.permuted", lambda value, heads: value)
    assert "passes, worst in held-out row" in failure(exported(run, "gguf", "f32", tmp_path))


def test_an_adapter_that_was_left_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge.MergedWeights, "get", lambda self, name: self.base.get(name))
    assert "passes, worst in held-out row" in failure(exported(run, "merged", "f32", tmp_path))


def test_a_template_of_another_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "parley.exporting.gguf.vocabulary._template",
        lambda tokenizer: tokenizer.chat_template.replace("\\n\\n", "\\n"),
    )
    line = failure(exported(run, "gguf", "f32", tmp_path))
    assert line.startswith("conversation 1 ('What be ")
    assert ": its prompt is token " in line


def test_merges_in_another_order(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = json.loads

    def reversed_merges(text: str, **options: Any) -> Any:
        value = original(text, **options)
        if isinstance(value, dict) and "merges" in value.get("model", {}):
            value["model"]["merges"] = value["model"]["merges"][::-1]
        return value

    monkeypatch.setattr("parley.exporting.gguf.vocabulary.json.loads", reversed_merges)
    assert ": its prompt is " in failure(exported(run, "gguf", "f32", tmp_path))


def test_an_end_token_that_no_longer_ends(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parley.exporting.llama_cpp.LlamaCppReader.ends_answers", lambda self, token: False)
    assert "answers would not end at token" in failure(exported(run, "gguf", "f32", tmp_path))


def test_other_answers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Any, prompts: Any, count: int) -> list[str]:
        return [""] * len(prompts)

    monkeypatch.setattr("parley.exporting.llama_cpp.LlamaCppReader.answers", silent)
    done = exported(run, "gguf", "f32", tmp_path)
    assert failure(done).startswith("4 of 4 answers differ, at most 1 may; first conversation 1")
    assert done.record.figures is not None
    assert [each.export for each in done.record.figures.differences] == [""] * 4


def test_weights_that_are_not_finite(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, rows: Any) -> Any:
        return (torch.full((len(row.positions), 384), torch.nan) for row in rows)

    monkeypatch.setattr("parley.exporting.readers.TransformersReader.logits", broken)
    assert "its probabilities are not finite" in failure(exported(run, "merged", "f32", tmp_path))


@pytest.mark.parametrize(("to", "file"), [("gguf", "tuned-f32.gguf"), ("merged", "model.safetensors")])
def test_a_file_that_its_reader_refuses(
    to: str, file: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = exporter_of(to)
    write = type(exporter).write

    def cut(self: Any, trained: Any, folder: Path, quant: str | None) -> None:
        write(self, trained, folder, quant)
        (folder / file).write_bytes((folder / file).read_bytes()[:5000])

    monkeypatch.setattr(type(exporter), "write", cut)
    done = exported(run, to, "f32", tmp_path)
    assert failure(done).startswith("cannot be read: ")
    assert (done.folder / file).is_file()


def figures_of(trained_SV: Tensor, export_SV: Tensor) -> Any:
    from parley.exporting.samples import ScoredRow

    return comparison._row(trained_SV, export_SV, ScoredRow([0] * (len(trained_SV) + 1), list(range(len(trained_SV)))))


def test_the_figures_are_those_of_their_names() -> None:
    trained_SV = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.9]])
    export_SV = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.9, 1.0]])
    row = figures_of(trained_SV, export_SV)
    wanted = torch.nn.functional.kl_div(
        export_SV.log_softmax(-1), trained_SV.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(row.kl, wanted)
    assert row.top1.tolist() == [False, False]
    assert row.flip.tolist() == [True, False]  # 0.9 is nearly as likely as 1.0
    torch.testing.assert_close(row.logit, torch.tensor([2.0, 0.1]))
    torch.testing.assert_close(row.loss, -export_SV.log_softmax(-1)[:, 0])
    torch.testing.assert_close(row.loss_trained, -trained_SV.log_softmax(-1)[:, 0])


@pytest.mark.parametrize("figure", ["mean_kl", "worst_kl", "loss", "flips", "logit"])
def test_each_mark_is_held(figure: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = Marks(flips=1, mean_kl=9, worst_kl=9, loss=9, answers=0, logit=9).model_copy(update={figure: -9.0})
    monkeypatch.setattr("parley.exporting.merged.MergedExporter.marks", lambda self, trained, quant: marks)
    assert "-9 passes" in failure(exported(run, "merged", "f32", tmp_path))


def test_the_report_has_a_section_of_exports(build_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = build_run("llama")
    write_report(run, Report(title="a run"))
    parley.export(run, "adapter")
    monkeypatch.setattr("parley.exporting.gguf.architectures.permuted", lambda value, heads: value)
    parley.export(run, "gguf", "f16")
    report = Report.model_validate_json((run / "report.json").read_text(encoding="utf-8"))
    assert [(each.name, each.status) for each in report.exports] == [("adapter", "verified"), ("gguf-f16", "failed")]
    assert report.exports[1].failure
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "gguf-f16: failed" in page
    assert "Answers that differ" in page


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_of_preferences_is_compared_on_its_held_out_answers(
    method: str, build_run: Callable[..., Path], tmp_path: Path
) -> None:
    answers = [{"prompt": f"What be {n}?", "chosen": f"It be {n}, arr.", "rejected": "No."} for n in range(40)]
    labelled = [{"prompt": each["prompt"], "completion": each["chosen"], "label": True} for each in answers]
    rows = tmp_path / "pairs.jsonl"
    lines = answers if method == "dpo" else labelled + [{"prompt": "x", "completion": "y", "label": False}] * 8
    rows.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    run = build_run("llama", data=str(rows), method=method)
    (done,) = parley.export(run, "adapter", output=tmp_path / "out")
    assert done.record.figures is not None
    assert (done.record.figures.source, done.record.figures.prompts) == ("held-out conversations", 4)
    assert done.record.status == "verified"
    if method == "dpo":
        trained = open_run(run)
        rows_ids = [row.input_ids for row in verification_samples(trained, 1).rows]
        assert all("arr." in text for text in trained.tokenizer.batch_decode(rows_ids))


def test_prompts_have_their_tools_calls_and_results(
    build_family: Callable[[str], Path], build_run: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(build_family("llama"), tmp_path / "base"))
    (base / "chat_template.jinja").write_text(WITH_TOOLS, encoding="utf-8")
    # With a description: llama.cpp writes an empty one for a tool without, which is another prompt.
    function = {"name": "sum", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"naïve": [1, 2]}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What be {n} and 1?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(n + 1)},
                {"role": "assistant", "content": "Arr."},
            ],
            "tools": tools,
        }
        for n in range(40)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    run = build_run(base, data=str(data))
    prompts = verification_samples(open_run(run), 1).prompts
    assert [len(prompt.messages) for prompt in prompts] == [3] * 4
    assert all(prompt.tools == tools for prompt in prompts)
    for done in parley.export(run, ["adapter", "gguf"], "f32", output=tmp_path / "out"):
        assert done.record.figures is not None
        # Greedy answers of random weights to prompts as long as these hang on rounding.
        assert (done.record.figures.prompts, done.record.figures.prompts_equal) == (4, 4), done.record.figures


def test_without_the_run_s_data_the_golden_conversations_are_compared(
    build_run: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    import shutil

    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    run = build_run("llama", data=str(data))
    data.unlink()
    done = exported(run, "merged", "f32", tmp_path)
    assert done.record.status == "verified"
    assert done.record.figures is not None
    assert done.record.figures.source == "golden conversations"
    assert any("compared on the golden conversations" in note for note in done.record.notes)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.exporting.reference.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(DeviceError, match=r"to verify the export .* or add --no-verify"):
        parley.export(run, "merged", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_are_limited_by_the_size_of_the_model(run: Path) -> None:
    trained = open_run(run)
    small, large = verification_samples(trained, 10**6), verification_samples(trained, 10**12)
    assert (small.answer_count, len(small.rows)) == (4, 4)
    assert sum(len(row.input_ids) for row in large.rows) <= samples.LEAST_SCORED
    one = samples._limited([samples.ScoredRow(list(range(50)), [3, 30])], 10)
    assert [(row.input_ids, row.positions) for row in one] == [(list(range(10)), [3])]


def test_conversations_with_control_token_text_are_left_out(build_run: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is <|eot_id|> {n}?", "completion": "A token."} for n in range(40)]
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    done = exported(build_run("llama", data=str(data)), "merged", "f32", tmp_path)
    assert done.record.figures is not None
    assert (done.record.figures.prompts, done.record.figures.left_out) == (0, 4)
