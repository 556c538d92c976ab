"""`parley.export`: every form is written whole, read back by another program, and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import parley
from parley.errors import UsageError
from parley.exporting.export import Export
from parley.exporting.record import read_record


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    out = tmp_path_factory.mktemp("exports") / "all"
    done = parley.export(run, ["adapter", "merged", "gguf"], ["f32", "q8_0"], output=out)
    return {each.record.name: each for each in done}


def test_every_target_and_type_is_an_export_of_its_own(exports: dict[str, Export]) -> None:
    assert list(exports) == ["adapter", "merged-f32", "gguf-f32", "gguf-q8_0"]


@pytest.mark.parametrize(
    ("name", "program"),
    [("adapter", "PEFT"), ("merged-f32", "transformers"), ("gguf-f32", "llama.cpp"), ("gguf-q8_0", "llama.cpp")],
)
def test_an_export_is_verified_by_a_program_that_is_not_parley(
    exports: dict[str, Export], name: str, program: str
) -> None:
    record = exports[name].record
    assert record.status == "verified", record.figures
    figures = record.figures
    assert figures is not None
    assert figures.program.startswith(program)
    assert figures.prompts == figures.prompts_equal == 4
    assert figures.tokens > 0
    assert figures.answers == figures.answers_equal or name == "gguf-q8_0"


def test_the_record_is_in_the_folder(exports: dict[str, Export]) -> None:
    for each in exports.values():
        assert read_record(each.folder) == each.record
        assert set(each.record.files) == {file.name for file in each.folder.iterdir()} - {"export.json"}


def test_the_card_says_verified(exports: dict[str, Export]) -> None:
    for each in exports.values():
        card = (each.folder / "README.md").read_text(encoding="utf-8")
        assert "Verified: read by" in card
        assert "UNVERIFIED" not in card


def test_merged_fp32_is_the_adapter_on_its_base(exports: dict[str, Export]) -> None:
    figures = exports["merged-f32"].record.figures
    assert figures is not None
    assert figures.worst_logit is not None
    assert figures.worst_logit < 1e-4


def test_default_places_are_in_the_run_and_an_existing_one_is_refused(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    (done,) = parley.export(run, "adapter", verify=False)
    assert done.folder == run / "exports" / "adapter"
    assert done.record.status == "not verified"
    assert "UNVERIFIED" in (done.folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="exists; remove it, or choose another --output"):
        parley.export(run, "adapter", verify=False)
    assert json.loads((done.folder / "export.json").read_text())["figures"] is None


@pytest.mark.parametrize(
    ("to", "quant", "message"),
    [
        ("ggfu", [], "--to ggfu: no such export; did you mean gguf?"),
        ("gguf", ["q9_0"], "--quant q9_0: gguf takes f32, f16, bf16, q8_0"),
        ("adapter", ["f16"], "--quant f16: none of these targets takes a type"),
        ([], [], "name at least one form"),
    ],
)
def test_unknown_targets_and_types_are_refused(run: Path, to: str, quant: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        parley.export(run, to, quant)
