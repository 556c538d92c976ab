"""The export methods of a notebook's model, with the arguments that tutorials use."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from parley.compat.unsloth import FastLanguageModel
from parley.compat.unsloth import saving as saving_module
from parley.errors import UsageError
from parley.exporting.push import Upload


@pytest.fixture(scope="module")
def tuned(tiny_llama_folder: Path) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_folder), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"], lora_alpha=8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, tokenizer


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Upload, str | None]]:
    uploads: list[tuple[Upload, str | None]] = []

    def push(upload: Upload, token: str | None) -> str:
        uploads.append((upload, token))
        return f"https://hub/{upload.repo}"

    monkeypatch.setattr(saving_module, "push", push)
    return uploads


def status(folder: Path) -> str:
    return str(json.loads((folder / "export.json").read_text())["status"])


def test_merged_16bit_is_verified_and_is_the_tuned_model(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    model.save_pretrained_merged(str(tmp_path / "out"), tokenizer=tokenizer, save_method=None)
    assert status(tmp_path / "out") == "verified"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (merged(ids).logits - model.eval()(ids).logits).abs().max() < 0.05
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned on `data of a notebook`" in card
    assert "| method | LoRA, rank 4, alpha 8 |" in card
    assert "learning rate" not in card


def test_the_lora_method_writes_the_adapter(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    folder = model.save_pretrained_merged(tmp_path / "lora", tokenizer, save_method="lora", verify=False)
    assert (folder / "adapter_model.safetensors").is_file()


def test_gguf_in_one_type_and_in_several(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    (folder,) = model.save_pretrained_gguf(str(tmp_path / "one"), tokenizer, quantization_method="not_quantized")
    assert [file.name for file in folder.glob("*.gguf")] == ["one-f16.gguf"]
    assert status(folder) == "verified"
    several = model.save_pretrained_gguf(tmp_path / "two", tokenizer, ["q8_0", "f32"], verify=False)
    assert [each.name for each in several] == ["gguf-q8_0", "gguf-f32"]
    (default,) = model.save_pretrained_gguf(tmp_path / "three", tokenizer, verify=False)
    assert [file.name for file in default.glob("*.gguf")] == ["three-q8_0.gguf"]


def test_what_is_pushed_is_verified_and_private(tuned: tuple[Any, Any], sent: list[Any]) -> None:
    model, tokenizer = tuned
    address = model.push_to_hub_merged("owner/pirate", tokenizer, save_method="lora", token="hf_x")
    assert address == "https://hub/owner/pirate"
    ((upload, token),) = sent
    assert token == "hf_x"
    assert (upload.public, upload.record.status, upload.record.run) == (False, "verified", "pirate")


def test_gguf_files_are_pushed_in_every_type(tuned: tuple[Any, Any], sent: list[Any]) -> None:
    model, tokenizer = tuned
    types = ["f16", "q8_0"]
    model.push_to_hub_gguf("o/p", tokenizer, quantization_method=types, token="", private=False, verify=False)
    assert [upload.record.quant for upload, _ in sent] == types
    assert [(upload.public, token) for upload, token in sent] == [(True, None)] * 2
    assert "p-f16.gguf" in sent[0][0].files


def test_options_of_unsloths_own_are_named_and_others_refused(
    tuned: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tuned
    with caplog.at_level(logging.WARNING):
        model.save_pretrained_merged(
            tmp_path / "a", tokenizer, save_method="lora", verify=False, maximum_memory_usage=0.5, token="hf_x"
        )
    assert "maximum_memory_usage, token have no meaning here" in caplog.text
    with pytest.raises(UsageError, match="unknown option 'quantisation_method'; did you mean 'quantization_method'"):
        model.save_pretrained_gguf(tmp_path / "b", tokenizer, quantisation_method="q8_0")
    with pytest.raises(UsageError, match="save_method='merged_4bit' is not offered here; use 'merged_16bit'"):
        model.save_pretrained_merged(tmp_path / "b", tokenizer, save_method="merged_4bit")
    with pytest.raises(UsageError, match="--quant iq2_xxs: gguf takes f32"):
        model.save_pretrained_gguf(tmp_path / "b", tokenizer, quantization_method="iq2_xxs")
    with pytest.raises(UsageError, match=r"push_to_hub=True.*call push_to_hub_merged"):
        model.save_pretrained_merged(tmp_path / "b", tokenizer, push_to_hub=True)
    with pytest.raises(UsageError, match="the tokenizer is saved with the weights; give it after the folder"):
        model.save_pretrained_gguf(tmp_path / "b", quantization_method="q8_0")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="exists; remove it, or choose another folder"):
        model.save_pretrained_gguf(tmp_path / "a", tokenizer)


def test_a_fully_tuned_model_is_exported_too(tiny_llama_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_llama_folder), full_finetuning=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    folder = model.save_pretrained_merged(tmp_path / "full", tokenizer)
    assert status(folder) == "verified"
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (merged.lm_head.weight - model.lm_head.weight).abs().max() < 0.01
    with pytest.raises(Exception, match="every weight was trained, so there is no adapter"):
        model.save_pretrained_merged(tmp_path / "no", tokenizer, save_method="lora")
