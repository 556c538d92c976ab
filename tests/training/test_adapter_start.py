"""`train` on an adapter's folder: it says what the folder is, and saves what was trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import parley
from parley.config import ModelSection, RunConfig
from parley.errors import ModelError, UsageError
from parley.models.fingerprint import base_fingerprint
from parley.models.load import load_model
from parley.models.resolve import model_folder
from parley.pipeline import dry_run
from parley.serving.loading import load_for_inference
from parley.training.run_folder import RunFolder

IDS = torch.arange(10, 42).view(2, 16)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "seven apples"}]}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return path


def config(model: Path, rows: Path, output: Path, adapter: str = "auto", **sections: object) -> RunConfig:
    return RunConfig.create(
        {
            "model": {"name": str(model), "max_seq_length": 64, "device": "cpu", "adapter": adapter},
            "data": {"source": str(rows), "heldout_rows": 0},
            "lora": {"r": 4},
            "training": {"max_steps": 2, "learning_rate": 1e-2},
            "report": {"from_heldout": 0},
            "output": str(output),
            **sections,
        }
    )


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits.clone()


@pytest.fixture(scope="module")
def first(tiny_llama_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    output = tmp_path_factory.mktemp("runs") / "first"
    return parley.train(config(tiny_llama_folder, rows, output), Console(file=io.StringIO())).folder


def test_a_run_s_folder_is_its_trained_weights(first: RunFolder, rows: Path, tmp_path: Path) -> None:
    """As the README has it: parley train --method dpo --model runs/mine."""
    section = ModelSection(name=str(first.path), device="cpu")
    assert model_folder(section) == first.adapter
    own = section.model_copy(update={"name": str(first.adapter)})
    assert torch.equal(logits(load_model(section)[0]), logits(load_model(own)[0]))
    assert base_fingerprint(section) == base_fingerprint(own)
    out = io.StringIO()
    again = config(first.path, rows, tmp_path / "run")
    dry_run(again, Console(file=out, width=500))
    assert f"{first.adapter} is an adapter on" in out.getvalue()
    assert again.model.name == str(first.adapter)  # what the new run records as its base


def test_a_whole_model_of_a_run_and_a_run_without_weights(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: x")
    section = ModelSection(name=str(tmp_path))
    with pytest.raises(ModelError, match=r"no trained weights yet; finish it first: parley train --resume"):
        model_folder(section)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(section) == tmp_path / "model"


@pytest.mark.parametrize(
    ("given", "lora", "words", "full"),
    [
        ("auto", {}, "training continues it", False),
        ("continue", {"r": 4}, "training continues it", False),
        ("merge", {"r": 2}, "it is merged into its base first", False),
        ("new", {"r": 2}, "it is left out, and its base is trained", False),
        ("auto", None, "it is merged into its base first", True),
        ("new", None, "it is left out, and its base is trained", True),
    ],
)
def test_what_is_saved_is_what_was_trained(
    tiny_llama_folder: Path, first: RunFolder, rows: Path, tmp_path: Path,
    given: str, lora: dict[str, int] | None, words: str, full: bool,
) -> None:  # fmt: skip
    out = io.StringIO()
    run = parley.train(
        config(first.adapter, rows, tmp_path / "run", adapter=given, lora=lora), Console(file=out, width=500)
    )
    assert f"{first.adapter} is an adapter on {tiny_llama_folder}: {words}" in out.getvalue()
    wanted = logits(run.model)
    before = logits(load_model(ModelSection(name=str(first.adapter), device="cpu"))[0])
    base = logits(load_model(ModelSection(name=str(tiny_llama_folder), device="cpu"))[0])
    start = base if given == "new" else before
    assert (wanted - start).abs().max() > 1e-3
    assert run.folder.weights.name == ("model" if full else "adapter")
    again, _ = RunFolder.open(tmp_path / "run").load()
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    alone, _ = load_model(ModelSection(name=str(run.folder.weights), device="cpu"))
    assert torch.allclose(logits(alone), wanted, atol=1e-5)
    if not full:
        with again.disable_adapter():
            assert torch.allclose(logits(again), before if given == "merge" else base, atol=1e-5)


def test_a_continued_run_serves_the_base_of_its_adapter(
    tiny_llama_folder: Path, first: RunFolder, rows: Path, tmp_path: Path
) -> None:
    parley.train(config(first.adapter, rows, tmp_path / "second", lora={}), Console(file=io.StringIO()))
    names = load_for_inference(str(tmp_path / "second")).names
    assert names == {"second": False, tiny_llama_folder.name: True}


def test_continuing_an_adapter_without_lora_is_refused_before_anything_is_made(
    first: RunFolder, rows: Path, tmp_path: Path
) -> None:
    wrong = config(first.adapter, rows, tmp_path / "run", adapter="continue", lora=None)
    for start in (parley.train, dry_run):
        with pytest.raises(UsageError, match=r"is an adapter, and lora: null trains every weight.*merge .* or new"):
            start(wrong, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_the_folder_is(first: RunFolder, rows: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    dry_run(config(first.adapter, rows, tmp_path / "run"), Console(file=out, width=500))
    assert "is an adapter on" in out.getvalue()
