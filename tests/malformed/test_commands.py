"""Malformed command lines, files and terminals: exit code 1 or 2 and one clear line, in bounded time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import rows, run  # noqa: F401  (fixtures)

from parley.cli.main import main
from parley.training.run_folder import RunFolder

LONG = "x" * 5000
ODD = "a\x1b[2Jb\u202ec[/d]\x07"

COMMAND_LINES: list[list[str]] = [
    ["trian"],
    [ODD],
    [LONG],
    ["--nope"],
    ["--version=1"],
    ["train"],
    ["train", "--nope"],
    ["train", "absent.yaml"],
    ["train", "{folder}"],
    ["train", "{binary}"],
    ["train", "{empty}"],
    ["train", LONG + ".yaml"],
    ["train", "a\x00b.yaml"],
    ["train", ODD + ".yaml"],
    ["train", "--set", "x"],
    ["train", "--data", "d", "--set", "="],
    ["train", "--data", "d", "--set", "training.max_steps"],
    ["train", "--data", "d", "--set", f"{LONG}=1"],
    ["train", "--data", "d", "--set", f"training.max_steps={LONG}"],
    ["train", "--data", "d", "--set", f"{ODD}=1"],
    ["train", "--model", "{empty}", "--data", "{rows}", "--dry-run"],
    ["train", "--model", "{model}", "--data", "{missing}", "--dry-run"],
    ["train", "--model", "{model}", "--data", "{folder}", "--dry-run"],
    ["train", "--model", "{model}", "--data", "{binary}", "--dry-run"],
    ["train", "--model", "{model}", "--data", "{rows}", "--output", "{rows}"],
    ["train", "--model", "{model}", "--data", "{rows}", "--output", "a\x00b"],
    ["train", "--model", "{model}", "--data", "{rows}", "--output", LONG],
    ["chat", "{missing}/x"],
    ["chat", "{folder}"],
    ["chat", "{rows}"],
    ["chat", LONG],
    ["chat", "a\x00b"],
    ["chat", ODD],
    ["chat", "one", "two"],
    ["chat", "--temperature", "hot"],
    ["chat", "--temperature", "-1"],
    ["chat", "--max-new-tokens", "0"],
    ["chat", "--max-new-tokens", "9" * 5000],
    ["chat", "--set", "temperature"],
    ["chat", "--set", "temperature="],
    ["chat", "--set", "=1"],
    ["chat", "--set", f"{ODD}=1"],
    ["chat", "--set", f"stop={LONG}["],
    ["generate"],
    ["generate", "{missing}", "--output", "{new}"],
    ["generate", "{folder}", "--output", "{new}"],
    ["generate", "{binary}", "--output", "{new}"],
    ["generate", "{empty}", "--output", "{new}"],
    ["generate", "{csv}", "--output", "{new}"],
    ["generate", "{broken}", "--output", "{new}"],
    ["generate", "{no_prompt}", "--output", "{new}"],
    ["generate", "{assistant}", "--output", "{new}"],
    ["generate", "{latin}", "--output", "{new}"],
    ["generate", "a\x00b.txt", "--output", "{new}"],
    ["generate", LONG + ".txt", "--output", "{new}"],
    ["generate", "{prompts}"],
    ["generate", "{prompts}", "--output", "{rows}"],
    ["generate", "{prompts}", "--output", "{folder}"],
    ["generate", "{prompts}", "--output", "{missing}/answers.jsonl"],
    ["generate", "{prompts}", "--output", "a\x00b"],
    ["generate", "{prompts}", "--output", LONG],
    ["generate", "{prompts}", "--output", "{new}", "--n", "0"],
    ["generate", "{prompts}", "--output", "{new}", "--slots", "0"],
    ["generate", "{prompts}", "--output", "{new}", "--model", "{folder}"],
    ["generate", "{prompts}", "--output", "{new}", "--base", "--model", "{model}"],
    ["inspect"],
    ["inspect", "{missing}"],
    ["inspect", "{folder}"],
    ["inspect", "{rows}", "--heldout", "{missing}"],
    ["inspect", "{rows}", "--row", "1"],
    ["inspect", "{rows}", "--model", "{folder}"],
    ["inspect", "{rows}", "--model", "{model}", "--row", "0"],
    ["inspect", "{rows}", "--model", "{model}", "--row", "99"],
    ["inspect", "{rows}", "--model", "{model}", "--row", "9" * 400],
    ["inspect", "{rows}", "--model", "{model}", "--html", "{folder}"],
    ["inspect", "{rows}", "--model", "{model}", "--html", "{missing}/page.html"],
    ["inspect", "{rows}", "--model", "{model}", "--html", "a\x00b"],
    ["inspect", "{missing}", "--model", "{model}"],
    ["inspect", ODD, "--model", "{model}"],
    ["eval"],
    ["eval", "{folder}"],
    ["eval", "{rows}"],
    ["eval", "a\x00b"],
    ["eval", LONG],
    ["eval", "{run}", "--data", "{missing}"],
    ["eval", "{run}", "--data", "{binary}"],
    ["eval", "{run}", "--rows", "0"],
    ["report", "{folder}"],
    ["report", "{rows}"],
    ["report", "a\x00b"],
    ["serve"],
    ["serve", "{folder}", "--port", "0"],
    ["serve", "{rows}", "--port", "0"],
    ["serve", "a\x00b", "--port", "0"],
    ["serve", LONG, "--port", "0"],
    ["serve", "{model}", "--port", "99999"],
    ["serve", "{model}", "--port", "http"],
    ["serve", "{model}", "--host", "no.such.host.invalid"],
    ["serve", "{model}", "--host", "a\x00b", "--api-key", "k"],
    ["serve", "{model}", "--host", LONG, "--api-key", "k"],
    ["serve", "{model}", "--host", "", "--api-key", "k", "--port", "1"],
    ["serve", "{model}", "--host", "0.0.0.0"],
    ["serve", "{model}", "--api-key", ""],
    ["serve", "{model}", "--api-key", "a\x00b"],
    ["serve", "{model}", "--api-key", "schlüssel"],
    ["serve", "{model}", "--max-model-len", "1"],
    ["serve", "{model}", "--max-num-seqs", "9" * 400],
    ["serve", "{model}", "--drain", "nan"],
    ["serve", "{model}", "--drain", "inf"],
    ["serve", "{model}", "--engine", "tgi"],
    ["bench", "marathon"],
    ["bench", ODD],
    ["bench", "--trainers", ""],
    ["bench", "--trainers", "parley--1"],
    ["bench", "--trainers", "parley-nan"],
    ["bench", "--trainers", "parley-inf"],
    ["bench", "--against", ODD],
    ["bench", "--steps", "0"],
    ["bench", "--output", "{missing}/x.json"],
    ["bench", "--output", "{folder}"],
    ["bench", "--output", "a\x00b"],
    ["bench", "--model", "{folder}"],
    ["bench", "--data", "{missing}"],
    ["doctor", "extra"],
    ["demo", "extra"],
    ["demo", "--output", "{rows}"],
    ["demo", "--output", "{folder}"],
    ["demo", "--output", "a\x00b"],
    ["demo", "--output", LONG],
]


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama_folder: Path,
    rows: Path,  # noqa: F811
    run: RunFolder,  # noqa: F811
) -> dict[str, str]:
    """What stands for the names in braces."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "held").mkdir()
    (folder / "held" / "file").write_text("something")
    contents: dict[str, bytes] = {
        "binary.jsonl": bytes(range(256)) * 8,
        "empty.txt": b"",
        "prompts.csv": b"prompt\nHello!\n",
        "broken.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
        "no_prompt.jsonl": b'{"question": "a"}\n',
        "assistant.jsonl": b'{"messages": [{"role": "assistant", "content": "a"}]}\n',
        "latin.txt": "schön\n".encode("latin-1"),
        "prompts.txt": b"Hello!\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    named = {Path(name).stem: str(folder / name) for name in contents} | {"csv": str(folder / "prompts.csv")}
    return named | {
        "prompts": str(folder / "prompts.txt"),
        "folder": str(folder / "held"),
        "missing": str(folder / "missing"),
        "new": str(folder / "answers.jsonl"),
        "model": str(tiny_llama_folder),
        "rows": str(rows),
        "run": str(run.path),
    }


def shown(arguments: list[str]) -> str:
    return " ".join(ascii(argument)[1:-1][:40] for argument in arguments)


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=shown)
def test_command_lines(
    outcome_of_command: Callable[..., str | None],
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for name, value in places.items():
        arguments = [argument.replace(f"{{{name}}}", value) for argument in arguments]
    line = outcome_of_command(*arguments)
    assert line is not None, "it ran"
    assert line.startswith("parley: error: ")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def as_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", **options.pop("env", {})}
    command = [sys.executable, "-m", "parley.cli.main", *arguments]
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment, timeout=120, **options
    )


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    """As `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = as_process("--help", stdout=writing)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("command", ["inspect {rows} --model {model}", "doctor --json", "eval {run}", "--version"])
def test_so_does_one_in_the_middle_of_a_command(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, outcome_of_command: Any, command: str
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main(command.format(**places).split())
    assert ended.value.code in (0, 1)


def test_a_terminal_that_is_not_utf_8_gets_escapes(places: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "\u4f60\u597d \u2615", "response": "na\u00efve"}), encoding="utf-8")
    ended = as_process(
        "inspect", str(data), "--model", places["model"], stdout=subprocess.PIPE,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.isascii()
    assert "\\u4f60" in ended.stdout


def test_chat_without_input_ends(
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    outcome_of_command: Callable[..., str | None],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert outcome_of_command("chat", places["model"]) is None
