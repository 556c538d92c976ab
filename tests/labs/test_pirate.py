"""The lab runs from its first cell to its last, as it stands and with its two lines changed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parley.evaluation.demo_scoring import PIRATE_WORDS

LABS = Path(__file__).parents[2] / "labs"
LAB = LABS / "pirate.py"
CHINESE_LAB = LABS / "pirate.zh.py"


def run_lab(folder: Path, **lines: object) -> str:
    """What the lab prints, run in `folder` after a reader changed lines such as `MODEL = ...`."""
    text = LAB.read_text(encoding="utf-8")
    for name, value in lines.items():
        text, changed = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert changed == 1
    lab = folder / "pirate.py"
    lab.write_text(text, encoding="utf-8")
    environment = os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, lab.name], cwd=folder, capture_output=True, encoding="utf-8", timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def heldout_loss(printed: str) -> tuple[float, float]:
    before, after = re.findall(r"\d+\.\d+", next(line for line in printed.splitlines() if "held-out loss" in line))
    return float(before), float(after)


def code_cells(lab: Path) -> list[str]:
    cells = re.split(r"^# %%", lab.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [cell for cell in cells if not cell.startswith(" [markdown]")]


def test_the_chinese_lab_has_the_same_code() -> None:
    assert code_cells(CHINESE_LAB) == code_cells(LAB)
    programs = [ast.dump(ast.parse(lab.read_text(encoding="utf-8"))) for lab in (CHINESE_LAB, LAB)]
    assert programs[0] == programs[1]  # so that one of them is run for both


def test_it_runs_on_another_model_and_data_set(tmp_path: Path, tiny_llama_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {n}.", "context": "Aboard." * (n % 2), "response": f"Arr, {n}!"} for n in range(200)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    printed = run_lab(tmp_path, MODEL=str(tiny_llama_folder), DATA="rows.jsonl", STEPS=2)
    assert "200 rows" in printed
    assert "train: 136 conversations" in printed
    assert "step 2/2" in printed
    assert "peak memory" in printed
    assert list((tmp_path / "runs/pirate-lab/adapter").glob("adapter_model.safetensors"))
    assert all(0 < loss < 20 for loss in heldout_loss(printed))


def test_its_rows_become_conversations_without_empty_turns(tmp_path: Path) -> None:
    """The function of the fifth cell, taken out of the lab's text."""
    text = LAB.read_text(encoding="utf-8")
    cell = re.search(r"^def to_conversation.*?\n\n\n", text, flags=re.MULTILINE | re.DOTALL)
    assert cell is not None
    lab: dict = {"SYSTEM": "Be kind."}
    exec(cell[0], lab)
    turns = lab["to_conversation"]({"instruction": "Who?", "context": "A ship.", "response": "Me."})["messages"]
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be kind."),
        ("user", "A ship.\n\nWho?"),
        ("assistant", "Me."),
    ]
    turns = lab["to_conversation"]({"instruction": "Who?", "context": "", "response": ""})["messages"]
    assert [turn["content"] for turn in turns] == ["Be kind.", "Who?"]


@pytest.mark.slow
def test_as_it_stands_it_teaches_the_embedded_model_to_talk_like_a_pirate(tmp_path: Path) -> None:
    printed = run_lab(tmp_path)
    before, after = heldout_loss(printed)
    assert after < before / 2
    table = printed[printed.index("held-out loss") :]
    columns = [line.split("│")[2:4] for line in table.splitlines() if line.count("│") == 4]
    said_before, said_after = (" ".join(column).lower() for column in zip(*columns, strict=True))
    assert not PIRATE_WORDS & set(re.findall(r"[a-z]+", said_before))
    assert len(PIRATE_WORDS & set(re.findall(r"[a-z]+", said_after))) >= 2
