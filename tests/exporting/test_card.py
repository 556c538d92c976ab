"""Model cards: metadata that the hub reads, the facts of the run, and no words of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from parley.config import RunConfig
from parley.exporting.card import card_text, published
from parley.exporting.comparison import Difference, Figures
from parley.exporting.record import ExportRecord
from parley.exporting.run_facts import RunFacts, run_facts
from parley.training.report import Report, Scores, StepFigures
from parley.training.run_folder import RunFolder


def record(target: str = "adapter", **fields: Any) -> ExportRecord:
    facts = RunFacts(
        data="owner/words",
        dataset="owner/words",
        rows=1200,
        heldout=64,
        supervised_tokens=34567,
        settings={"method": "LoRA, rank 16, alpha 32", "learning rate": "0.0002, linear"},
        before=Scores(heldout_loss=1.5, accuracy=0.97),
        after=Scores(heldout_loss=0.25, accuracy=0.95),
    )
    figures = Figures(program="PEFT 0.21", source="held-out conversations", prompts=4, prompts_equal=4)
    values = {"run": "mine", "base": "owner/base", "training": facts, "figures": figures, "status": "verified"}
    return ExportRecord(target=target, quant=None, **{**values, **fields})


@pytest.mark.parametrize(
    ("target", "library", "relation"),
    [
        ("adapter", "peft", "adapter"),
        ("vllm", "peft", "adapter"),
        ("merged", "transformers", "finetune"),
        ("gguf", "gguf", "quantized"),
        ("ollama", "gguf", "quantized"),
        ("gguf-lora", "gguf", "adapter"),
        ("mlx", "mlx", "adapter"),
    ],
)
def test_the_hub_reads_the_metadata(target: str, library: str, relation: str) -> None:
    data = ModelCard(card_text(record(target))).data
    assert data.base_model == "owner/base"
    assert data.base_model_relation == relation
    assert data.library_name == library
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == "owner/words"
    assert data.tags is not None
    assert ("lora" in data.tags) == (relation == "adapter")
    assert "parley" in data.tags


def test_the_text_has_data_settings_figures_proof_and_limits() -> None:
    text = ModelCard(card_text(record())).text
    assert "Verified: read by PEFT 0.21" in text
    assert "| conversations | 1,200, and 64 held out |" in text
    assert "| supervised tokens | 34,567 |" in text
    assert "| method | LoRA, rank 16, alpha 32 |" in text
    assert "| loss, nats a token | 1.5000 | 0.2500 |" in text
    assert "| right answers | 97% | 95% |" in text
    assert "| prompts with the same token ids | 4 of 4 |" in text
    assert "## Use\n    PeftModel.from_pretrained" in text
    assert "## Limits\n- All limits of the base model hold" in text
    assert "UNVERIFIED" not in text


def test_a_run_of_preferences_says_so() -> None:
    facts = RunFacts(data="owner/pairs", training_method="dpo", settings={"learned from": "preferences (DPO)"})
    text = card_text(record(training=facts))
    assert ModelCard(text).data.tags == ["parley", "dpo", "lora"]
    assert "| learned from | preferences (DPO) |" in text


def test_names_that_are_no_hub_ids_are_not_in_the_metadata() -> None:
    card = ModelCard(card_text(record(base="parley-demo", training=RunFacts(data="rows.jsonl"))))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "`parley-demo`, fine-tuned on `rows.jsonl` with Parley" in card.text
    assert "No figures were measured" in card.text


def test_what_is_not_verified_says_so_twice() -> None:
    text = card_text(record(status="not verified", figures=None))
    assert "**UNVERIFIED**: it was not compared" in text
    assert "- UNVERIFIED: its answers may differ" in text


def test_what_is_published_quotes_no_data_and_names_no_folder() -> None:
    figures = Figures(
        program="p", source="s", failure="conversation 3 ('My \"secret\" (x)'): its prompt is 4 tokens, wanted 5"
    )
    figures.differences.append(Difference(conversation=0, question="secret", trained="secret", export="secret"))
    kept = record(figures=figures, status="failed", notes=["the data /home/ann/secret/rows.jsonl: cannot be read, 1/2"])
    shared = published(kept)
    assert "secret" not in card_text(shared) + shared.model_dump_json()
    assert shared.notes == ["the data rows.jsonl: cannot be read, 1/2"]
    assert shared.figures is not None
    assert shared.figures.failure == "conversation 3: its prompt is 4 tokens, wanted 5"
    assert kept.figures is not None
    assert kept.figures.differences  # the record itself is as it was


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    config = RunConfig.create(
        {
            "output": str(tmp_path / "run"),
            "data": str(tmp_path / "rows.jsonl"),
            "lora": {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj"]},
            "training": {"learning_rate": 1e-3},
        }
    )
    run = RunFolder.create(config)
    assert "learning rate" not in run_facts(run).settings  # nobody trained with these settings
    run.events.touch()
    facts = run_facts(run)
    assert facts.data == "rows.jsonl"
    assert facts.dataset is None
    assert facts.rows is None
    assert facts.settings["method"] == "LoRA (DoRA), rank 8, alpha 16"
    assert facts.settings["learning rate"] == "0.001, linear"
    report = Report(
        title="t",
        after=Scores(heldout_loss=0.5),
        steps=[StepFigures(step=30)],
        data_summary={"source": str(tmp_path), "kept": 100, "heldout": 5, "supervised_tokens": 900},
    )
    (run.path / "report.json").write_text(report.model_dump_json(), encoding="utf-8")
    facts = run_facts(run)
    assert (facts.rows, facts.heldout, facts.supervised_tokens) == (100, 5, 900)
    assert facts.after == Scores(heldout_loss=0.5)
    assert facts.settings["steps"] == "30"
    assert str(tmp_path) not in facts.model_dump_json()


@pytest.mark.parametrize(
    ("source", "dataset"),
    [("owner/words", "owner/words"), ("data/rows.jsonl", None), ("./data", None), ("parley-demo-pirate", None)],
)
def test_a_hub_id_is_told_from_a_path(source: str, dataset: str | None, tmp_path: Path) -> None:
    run = RunFolder.create(RunConfig.create({"output": str(tmp_path / "run"), "data": source}))
    assert run_facts(run).dataset == dataset
