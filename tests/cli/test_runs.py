from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, loss, model in (("first", 1.5, "owner/one"), ("second", 1.25, "owner/two")):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "run.yaml").write_text(f"model: {{name: {model}}}\ndata: {{source: rows.jsonl}}\n")
        events = [{"event": "step", "step": 7, "loss": loss}, {"event": "eval", "step": 7, "eval_loss": 2 * loss},
                  {"event": "finished", "step": 7}]  # fmt: skip
        (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return tmp_path / "runs"


def test_runs_are_listed(parley: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    ended = parley("runs", folder)
    assert ended.code == 0, ended.err
    lines = {line.split()[0]: line for line in ended.out.splitlines()[1:]}
    assert lines["first"].split()[1:5] == ["finished", "7", "1.500", "3.000"]
    assert "owner/two" in lines["second"]
    monkeypatch.chdir(folder.parent)
    assert parley("runs").out == ended.out


def test_a_narrow_terminal_shows_the_names_of_runs(
    parley: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.cli.runs.out", Console(width=20))
    lines = [line.split() for line in parley("runs", folder).out.splitlines()]
    assert lines[0] == ["run", "state"]
    assert sorted(lines[1:]) == [["first", "finished"], ["second", "finished"]]


def test_runs_as_json(parley: Callable[..., Any], folder: Path) -> None:
    found = json.loads(parley("runs", folder, "--json").out)
    assert {Path(run["path"]).name: run["loss"] for run in found} == {"first": 1.5, "second": 1.25}
    assert {run["state"] for run in found} == {"finished"}
    assert set(found[0]) == {
        "path", "state", "model", "data", "step", "max_steps", "loss", "heldout_loss", "date", "size", "reason",
    }  # fmt: skip


def test_two_runs_are_compared(parley: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    ended = parley("runs", "diff", folder / "first", folder / "second")
    assert ended.code == 0, ended.err
    assert "model.name" in ended.out
    assert "owner/one" in ended.out
    assert "rows.jsonl" not in ended.out
    assert "rows.jsonl" in parley("runs", "diff", folder / "first", folder / "second", "--all").out
    found = json.loads(parley("runs", "diff", folder / "first", folder / "second", "--json").out)
    assert found["settings"] == {"model.name": ["owner/one", "owner/two"]}
    assert found["results"]["loss"] == [1.5, 1.25]
    assert "no difference" in parley("runs", "diff", folder / "first", folder / "first").out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent"], 1, "no such folder"),
        (["diff"], 2, "wanted two"),
        (["diff", "runs/first"], 2, "wanted two"),
        (["diff", "runs/first", "absent"], 1, "no run there"),
        (["runs", "more"], 2, "wanted one"),
        (["runs", "--all"], 2, "--all is for"),
    ],
)
def test_refusals(
    parley: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    ended = parley("runs", *arguments)
    assert ended.code == code
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_names_are_escaped(parley: Callable[..., Any], folder: Path) -> None:
    (folder / "first").rename(folder / "first\x1b[31m[bold]red")
    (folder / "second" / "run.yaml").write_text('model: {name: "a\\u001b[2Jb"}\n')
    for arguments in ([folder], ["diff", folder / "first\x1b[31m[bold]red", folder / "second"]):
        ended = parley("runs", *arguments)
        assert ended.code == 0, ended.err
        assert "\x1b" not in ended.out
    empty = folder / "empty"
    empty.mkdir()
    assert "no runs in" in parley("runs", empty).out


def test_listing_loads_no_torch(folder: Path) -> None:
    code = f"import sys; sys.argv = ['parley', 'runs', {str(folder)!r}]\n" + (
        "from parley.cli.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
