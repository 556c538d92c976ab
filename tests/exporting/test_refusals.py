"""What cannot be exported is refused in one line, and nothing half-written is left."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import parley
from parley.errors import ModelError, ParleyError, RunError, UsageError
from parley.exporting.adapter import AdapterExporter
from parley.exporting.trained_model import TrainedModel


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run of one's own to damage."""
    return Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports")))


def refused(run: Path, kind: type[ParleyError], message: str, to: str = "merged", **options: Any) -> None:
    """`run` is not exported, with `message`, and the run's folder is as before."""
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(kind, match=message):
        parley.export(run, to, verify=False, **options)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_a_run_that_did_not_finish(copied: Path) -> None:
    shutil.rmtree(copied / "adapter")
    refused(copied, RunError, "the run did not finish")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    refused(tmp_path, RunError, "no run there")


@pytest.mark.parametrize("to", ["merged", "gguf", "gguf-lora", "adapter"])
def test_a_damaged_adapter(copied: Path, to: str) -> None:
    path = copied / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copied, ModelError, "the adapter's weights are damaged", to)


def test_an_adapter_that_is_not_finite(copied: Path) -> None:
    path = copied / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    refused(copied, ModelError, "holds values that are not finite", "gguf")


def test_a_vocabulary_that_was_changed_after_training(copied: Path) -> None:
    path = copied / "adapter" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[len(merges) // 2 :]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(copied, RunError, "its tokenizer or chat template was changed after training")


def test_a_template_that_was_changed_after_training(copied: Path) -> None:
    path = copied / "adapter" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("\\n\\n", "\\n"), encoding="utf-8")
    refused(copied, RunError, "its tokenizer or chat template was changed after training", "gguf")


def test_golden_ids_that_are_no_json(copied: Path) -> None:
    (copied / "golden.json").write_text("[")
    refused(copied, RunError, "golden.json: cannot be read")


@pytest.fixture
def own_base(build_family: Callable[[str], Path], build_run: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base model of one's own, and a run on it."""
    base = Path(shutil.copytree(build_family("llama"), tmp_path / "base"))
    return base, build_run(base)


def shift_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    shifted = {name: value + 0.01 for name, value in load_file(path).items()}
    save_file(shifted, path, metadata={"format": "pt"})


def test_a_base_that_is_not_the_run_s(own_base: tuple[Path, Path]) -> None:
    base, run = own_base
    shift_weights(base)
    refused(run, ModelError, "is not the base that .* was trained on")


def test_a_base_that_is_gone(own_base: tuple[Path, Path]) -> None:
    base, run = own_base
    shutil.rmtree(base)
    refused(run, RunError, "its base model is neither at")


def test_another_base_for_a_16_bit_one(run: Path, build_family: Callable[[str], Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(build_family("llama"), tmp_path / "other"))
    shift_weights(other)
    refused(run, ModelError, "was trained on the 16-bit .* and these are other weights", base=str(other))


def test_an_unsupported_family(build_run: Callable[..., Path]) -> None:
    run = build_run("starcoder2", target_modules=["q_proj"])
    refused(run, ModelError, "starcoder2 models are not exported to GGUF; Parley knows", "gguf")
    assert parley.export(run, "merged")[0].record.status == "verified"


def test_an_existing_folder(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    refused(copied, UsageError, "here: exists; remove it, or choose another --output", output=tmp_path / "here")
    (copied / "exports" / "merged").mkdir(parents=True)
    refused(copied, UsageError, "merged: exists; remove it")


@pytest.mark.parametrize("to", ["merged", "gguf", "adapter", "gguf-lora"])
def test_a_full_disk(copied: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # Each writes with another of these; all have written something before.
    monkeypatch.setattr("parley.exporting.merged.save_file", full)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    monkeypatch.setattr("parley.exporting.adapter.shutil.copyfile", full)
    refused(copied, RunError, "disk full while writing .*; free space, or choose another --output", to)


@pytest.mark.parametrize("to", ["gguf", "gguf-lora"])
@pytest.mark.parametrize(("free", "message"), [(0, "disk full while writing"), (2**30, "cannot be written")])
def test_an_array_that_numpy_wrote_in_part(
    copied: Path, to: str, free: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy raises OSError without a number, whatever the system's reason was."""

    def partly(*args: Any, **options: Any) -> None:
        raise OSError("262144 requested and 217760 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", partly)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", partly)
    usage = shutil.disk_usage(copied)._replace(free=free)
    monkeypatch.setattr("parley.exporting.gguf.convert.shutil.disk_usage", lambda path: usage)
    refused(copied, RunError, message, to)


def test_a_place_that_cannot_be_written(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(copied, RunError, "cannot be written", output=tmp_path / "file" / "inside")


def test_an_export_that_was_killed_is_written_again(copied: Path) -> None:
    left = copied / "exports" / ".adapter.unfinished"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    (done,) = parley.export(copied, "adapter", verify=False)
    assert not left.exists()
    assert "half" not in done.record.files


def test_two_exports_at_once_into_one_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first writes, and does not disturb it."""
    write, messages = AdapterExporter.write, []

    def interrupted(self: AdapterExporter, trained: TrainedModel, folder: Path, quant: str | None) -> None:
        monkeypatch.setattr(AdapterExporter, "write", write)
        write(self, trained, folder, quant)
        with pytest.raises(RunError) as caught:
            parley.export(copied, "adapter", verify=False)
        messages.append(str(caught.value))

    monkeypatch.setattr(AdapterExporter, "write", interrupted)
    (done,) = parley.export(copied, "adapter", verify=False)
    assert "is being written by process" in messages[0]
    assert "adapter_model.safetensors" in done.record.files
    assert [path.name for path in (copied / "exports").iterdir()] == ["adapter"]


def test_one_of_several_that_fails(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were finished stay, and are named."""

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("parley.exporting.merged.save_file", full)
    said = Console(file=io.StringIO(), width=200)
    with pytest.raises(RunError, match=r"disk full while writing .*merged"):
        parley.export(copied, ["adapter", "merged", "vllm"], verify=False, console=said)
    assert [path.name for path in (copied / "exports").iterdir()] == ["adapter"]
    assert f"written before that: {copied}/exports/adapter (not verified)" in said.file.getvalue().splitlines()


def test_ctrl_c_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parley.exporting.adapter.save_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        parley.export(copied, "adapter", verify=False)
    assert not (copied / "exports").exists()


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_is_more_than_lora_matrices_is_no_lora_gguf(
    lora: dict[str, Any], build_run: Callable[..., Path]
) -> None:
    refused(build_run("llama", **lora), ModelError, "is changed by more than LoRA matrices", "gguf-lora")


def test_an_adapted_head_of_a_tied_base_is_no_lora_gguf(tied_llama: Path, build_run: Callable[..., Path]) -> None:
    run = build_run(tied_llama, target_modules=["q_proj", "lm_head"])
    refused(run, ModelError, "the adapted head of a base whose head is its embedding", "gguf-lora")


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"down_proj": 3}}),
        ("phi3", {}),
    ],
)
def test_a_lora_gguf_on_its_base_is_the_trained_model(
    family: str, lora: dict[str, Any], build_run: Callable[..., Path], tmp_path: Path
) -> None:
    (done,) = parley.export(build_run(family, **lora), "gguf-lora", output=tmp_path / "out")
    assert done.record.status == "verified", done.record.figures
    assert {file.name for file in done.folder.iterdir()} == {
        "tuned-lora.gguf", "chat_template.jinja", "README.md", "export.json",
    }  # fmt: skip
