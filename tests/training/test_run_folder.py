from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from parley.config import RunConfig
from parley.errors import RunError
from parley.training.checkpoint import write_fault
from parley.training.run_folder import RunFolder, is_disk_full


def config(path: Path) -> RunConfig:
    return RunConfig.create({"output": str(path)})


class Full(torch.nn.Module):
    """A model whose disk fails after half of it was written."""

    def __init__(self, fault: Exception, times: int) -> None:
        super().__init__()
        self.fault, self.times = fault, times

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half.safetensors").write_bytes(b"half")
        if self.times:
            self.times -= 1
            raise self.fault


def test_settings_come_back_as_they_went(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path / "run"))
    assert folder.config == config(tmp_path / "run")


@pytest.mark.parametrize("holds", ["run.yaml", "thesis.docx"])
def test_a_taken_folder_is_refused(tmp_path: Path, holds: str) -> None:
    (tmp_path / holds).write_text("mine")
    with pytest.raises(RunError, match="choose another with --output"):
        RunFolder.create(config(tmp_path))
    assert (tmp_path / holds).read_text() == "mine"


def test_an_unfinished_run_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run there"):
        RunFolder.open(tmp_path)
    RunFolder.create(config(tmp_path / "run"))
    with pytest.raises(RunError, match="did not finish"):
        RunFolder.open(tmp_path / "run")


def test_golden_ids_are_those_of_the_saved_template(tiny_llama_folder: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path / "run"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    folder.save_weights(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tokenizer, full=True)
    again = AutoTokenizer.from_pretrained(folder.weights)
    for entry in json.loads(folder.golden.read_text()):
        assert again.apply_chat_template(entry["messages"], return_dict=False) == entry["input_ids"]
        asked = again.apply_chat_template(entry["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert asked == entry["prompt_ids"]


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EROFS, "Read-only file system"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
    ids=str,
)
def test_a_full_disk_leaves_nothing_half_written_and_rescues_the_weights(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = RunFolder.create(config(tmp_path / "run"))
    with pytest.raises(RunError, match=str(write_fault(fault))) as caught:
        folder.save_weights(Full(fault, times=1), tiny_tokenizer, full=True)
    assert sorted(path.name for path in folder.path.iterdir()) == ["base.json", "run.lock", "run.yaml"]
    rescued = RunFolder.open(Path(str(caught.value).split("whole in ")[1].split(",")[0]))
    assert (rescued.weights / "half.safetensors").is_file()
    assert json.loads(rescued.golden.read_text())


def test_a_tokenizer_that_cannot_be_written_leaves_the_adapter_that_was_there(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = RunFolder.create(config(tmp_path / "run"))
    folder.save_weights(Full(OSError(), times=0), tiny_tokenizer, full=False)
    tokens = (folder.adapter / "tokenizer.json").stat().st_size
    unlimited, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (tokens // 2, hard))
    try:
        with pytest.raises(RunError, match="file too large"):
            folder.save_weights(Full(OSError(), times=0), tiny_tokenizer, full=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, hard))
    assert (folder.adapter / "tokenizer.json").stat().st_size == tokens
    assert (folder.adapter / "half.safetensors").is_file()


def test_a_disk_full_everywhere_is_one_line(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = RunFolder.create(config(tmp_path / "run"))
    with pytest.raises(RunError, match="free space") as caught:
        folder.save_weights(Full(OSError(errno.ENOSPC, "x"), times=2), tiny_tokenizer, full=False)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_known_by_errno_and_by_message() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(SafetensorError("Error while serializing: No space left on device (os error 28)"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"))
    assert not is_disk_full(PermissionError(errno.EACCES, "x"))
    assert not is_disk_full(RuntimeError("size mismatch"))
