"""The tool that makes the embedded model, run small: what it leaves behind is a model like the embedded one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "build_demo_model.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_demo_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tool.prepare(folder, conversations=60)
    return folder


def test_labels_are_the_assistants_words_alone(tool, work):
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "untrained")
    rows = Dataset.from_parquet(str(work / "conversations.parquet"))
    conversations = tool.base_conversations(60, seed=tool.SEED)
    assert len(rows) == 60
    for row, messages in zip(rows, conversations, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        said = tokenizer.decode([label for label in row["labels"] if label >= 0])
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert said == "".join(f"{answer}<|eot_id|>" for answer in answers)
        assert row["length"] == len(row["labels"])


def test_preparing_again_keeps_what_is_there(tool, work):
    before = (work / "conversations.parquet").stat().st_mtime_ns
    tool.prepare(work, conversations=10)
    assert (work / "conversations.parquet").stat().st_mtime_ns == before


def test_batches_are_padded_and_masked(tool):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = tool.padded(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_short_training_leaves_a_complete_folder(tool, work, tmp_path, monkeypatch):
    output = tmp_path / "demo-model"
    few = tool.heldout_questions()[:4]
    monkeypatch.setattr(tool, "heldout_questions", lambda: few)
    options = ["--work", str(work), "--output", str(output), "--steps", "2", "--batch", "4"]
    monkeypatch.setattr("sys.argv", ["build_demo_model.py", *options])
    tool.main()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    untrained = AutoModelForCausalLM.from_pretrained(work / "untrained", dtype=model.dtype)
    assert str(model.dtype) == "torch.bfloat16"
    assert not model.lm_head.weight.equal(untrained.lm_head.weight)
    assert sum(path.stat().st_size for path in output.iterdir()) <= 8_000_000
    assert "2 steps of 4 conversations" in (output / "README.md").read_text()
    settings = json.loads((output / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) == set(untrained.config.eos_token_id)  # some versions repeat one
    assert len(set(settings["eos_token_id"])) == 3
