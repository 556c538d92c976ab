"""`parley export` as a user sees it: a table, one line for a failure, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_every_export_is_a_column_with_its_figures(parley: Callable[..., Any], run: Any, tmp_path: Path) -> None:
    ended = parley(
        "export", run.path, "--to", "adapter", "--to", "gguf", "--quant", "f16", "--output", tmp_path / "out"
    )
    assert ended.code == 0, ended.err
    assert ended.err == ""
    lines = {line.split("  ")[0].strip(): line for line in ended.out.splitlines()}
    assert f"written: {tmp_path / 'out' / 'gguf-f16'}" in ended.out
    assert lines["result"].split() == ["result", "verified", "verified"]
    assert "1 of 1" in ended.out
    assert (tmp_path / "out" / "gguf-f16" / "tuned-f16.gguf").is_file()


def test_an_export_that_differs_is_one_line_and_exit_code_1(
    parley: Callable[..., Any], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parley.exporting.gguf.architectures.permuted", lambda value, heads: value + 1)
    ended = parley("export", run.path, "--to", "gguf", "--quant", "f16", "--output", tmp_path / "out")
    assert ended.code == 1
    assert ended.err.startswith("parley: error: gguf-f16 is UNVERIFIED: ")
    assert ended.err.count("\n") == 1
    assert "UNVERIFIED" in ended.out
    assert (tmp_path / "out" / "tuned-f16.gguf").is_file()


def test_what_was_not_compared_is_said(parley: Callable[..., Any], run: Any, tmp_path: Path) -> None:
    ended = parley("export", run.path, "--to", "adapter", "--no-verify", "--output", tmp_path / "out")
    assert ended.code == 0
    assert "UNVERIFIED" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--to'; parley export --help lists what there is"),
        (("--to", "onnx"), "--to onnx: no such export"),
        (("--to", "gguf", "--quant", "q3_k"), "--quant q3_k: gguf takes f32"),
    ],
)
def test_a_wrong_option_is_one_line(
    parley: Callable[..., Any], run: Any, arguments: tuple[str, ...], message: str
) -> None:
    ended = parley("export", run.path, *arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"parley: error: {message}")
    assert ended.err.count("\n") == 1
