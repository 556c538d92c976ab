from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from parley.exporting.card import write_card
from parley.exporting.comparison import Figures
from parley.exporting.record import ExportRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small export, verified."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(bytes(5000))
    (path / "optimizer.pt").touch()
    figures = Figures(program="PEFT", source="held-out conversations")
    record = ExportRecord(target="adapter", quant=None, run="mine", base="o/b", status="verified", figures=figures)
    write_card(path, record)
    record.write(path)
    return path


def test_the_files_are_shown_and_nothing_is_sent_in_a_dry_run(parley: Callable[..., Any], folder: Path) -> None:
    ended = parley("push", folder, "owner/name", "--dry-run")
    assert ended.code == 0, ended.err
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "adapter_model.safetensors 4.9 KiB" in lines
    assert "adapter of mine, verified, to owner/name (private)" in lines
    assert "not sent: optimizer.pt" in lines
    assert lines[-1] == "nothing was sent (--dry-run)"


def test_without_an_answer_nothing_is_sent(parley: Callable[..., Any], folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("parley.exporting.push.push", lambda upload: pytest.fail("sent"))
    for answer in ("", "n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert parley("push", folder, "owner/name").code == 1


def test_with_yes_it_is_sent(parley: Callable[..., Any], folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("parley.exporting.push.push", lambda upload: f"https://hub/{upload.repo}")
    ended = parley("push", folder, "owner/name", "--yes", "--public")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "sent to https://hub/owner/name")
    assert "(public)" in ended.out


def test_a_card_is_written_again(parley: Callable[..., Any], folder: Path) -> None:
    (folder / "README.md").unlink()
    assert parley("card", folder).code == 0
    assert ModelCard((folder / "README.md").read_text()).data.base_model == "o/b"
    (folder / "README.md").unlink()
    printed = parley("card", folder, "--output", "-")
    assert ModelCard(printed.out).data.base_model_relation == "adapter"
    assert not (folder / "README.md").exists()


def test_a_run_has_a_card_too(parley: Callable[..., Any], run: Any, tmp_path: Path) -> None:
    path = getattr(run, "path", run)
    ended = parley("card", path, "--output", tmp_path / "card.md")
    assert ended.code == 0, ended.err
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "**UNVERIFIED**: it was not compared" in text
    assert "| method | LoRA" in text


def test_what_is_neither_run_nor_export_is_refused(parley: Callable[..., Any], tmp_path: Path) -> None:
    for command in (("card", tmp_path), ("push", tmp_path, "owner/name")):
        ended = parley(*command)
        assert ended.code == 1
        assert "neither a run nor an export" in ended.err
