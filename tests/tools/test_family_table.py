"""The table of model families: from the declarations and what tests recorded, and stale where either has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_table
import pytest
from family_table import END, OTHERS_START, START, declarations_digest, with_tables

from parley.models.families import FAMILIES

PAGE = f"before\n{START}old\n{END}\nbetween\n{OTHERS_START}old\n{END}\nafter\n"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    facts = {"members": 2, "fused": 5.6e-7, "captured": 4.9e-7, "greedy_tokens": 1280, "gguf": 7, "forms": 6}
    made = {"declarations": declarations_digest(), "families": {name: dict(facts) for name in FAMILIES}}
    made["families"]["nemotron"] = {"fused": None, "captured": 3e-7}
    monkeypatch.setattr(family_table, "RESULTS", tmp_path / "families.json")
    return made


def write(results: dict[str, Any]) -> None:
    family_table.RESULTS.write_text(json.dumps(results))


def test_each_family_is_a_line_with_its_figures(results: dict[str, Any]) -> None:
    write(results)
    page = with_tables(PAGE)
    lines = page.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][2:] == [
        family.members for family in FAMILIES.values()
    ]
    assert "| OLMo 2 | 6e-07 | 5e-07 | 1,280 tokens | 7 x 64 tokens | 6 of 7 forms |" in lines
    assert "old" not in page
    assert "nemotron 3e-07." in page
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert with_tables(page) == page


def test_a_changed_or_new_declaration_makes_it_stale(results: dict[str, Any]) -> None:
    write(results | {"declarations": "another"})
    with pytest.raises(SystemExit, match=r"older than a declaration; run python benchmarks/family_parity\.py --write"):
        with_tables(PAGE)
    del results["families"]["olmo2"]
    write(results)
    with pytest.raises(SystemExit, match="older than olmo2"):
        with_tables(PAGE)


def test_no_two_families_have_one_name() -> None:
    assert len({family.members for family in FAMILIES.values()}) == len(FAMILIES)
