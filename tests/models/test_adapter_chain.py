"""What the folder of an adapter means as `model.name`: go on with it, merge it, or start anew on its base."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from parley.config import LoraSection, ModelSection
from parley.errors import ModelError, UsageError
from parley.models.adapters import attach_lora, continue_adapter, load_adapter, prepare_full
from parley.models.load import load_model, load_tokenizer

IDS = torch.arange(10, 42).view(2, 16)


def load(folder, **fields):
    return load_model(ModelSection(**{"name": str(folder), "device": "cpu", **fields}))[0]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.clone()


def train_a_little(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def saved_adapter(base, folder, seed=3, **fields):
    model = train_a_little(attach_lora(base, LoraSection(**{"r": 4, **fields}), seed=1), seed)
    model.save_pretrained(folder)
    return logits(model)


def test_a_loaded_adapter_is_trainable_and_nothing_else_is(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path, modules_to_save=["norm"])
    for model in (load(tmp_path), load_adapter(load(tiny_llama_folder), tmp_path)):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
        assert not model.training
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merge_and_new(tiny_llama_folder, tmp_path):
    untouched = logits(load(tiny_llama_folder))
    tuned = saved_adapter(load(tiny_llama_folder), tmp_path, modules_to_save=["norm"])
    assert torch.equal(logits(load(tmp_path, adapter="continue")), tuned)
    merged = load(tmp_path, adapter="merge")
    assert torch.allclose(logits(merged), tuned, atol=1e-5)
    assert merged.name_or_path == str(tmp_path)
    assert not hasattr(merged, "peft_config")
    new = load(tmp_path, adapter="new")
    assert torch.equal(logits(new), untouched)
    assert new.name_or_path == str(tiny_llama_folder)


def test_full_fine_tuning_of_a_merged_adapter_saves_what_was_trained(tiny_llama_folder, tiny_tokenizer, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path / "adapter")
    model = prepare_full(load(tmp_path / "adapter", adapter="merge"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    wanted = logits(train_a_little(model))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), wanted)


def test_an_adapter_on_a_merged_adapter_reloads_as_it_was(tiny_llama_folder, tmp_path, caplog):
    saved_adapter(load(tiny_llama_folder), tmp_path / "one")
    wanted = saved_adapter(load(tmp_path / "one", adapter="merge"), tmp_path / "two", seed=4)
    assert json.loads((tmp_path / "two/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "one"
    )
    with caplog.at_level(logging.INFO, logger="parley"):
        again = load(tmp_path / "two")
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    assert f"{tmp_path / 'one'} is merged into {tiny_llama_folder}" in caplog.text
    with again.disable_adapter():
        assert torch.allclose(logits(again), logits(load(tmp_path / "one")), atol=1e-5)


def test_tokenizer_is_that_of_the_last_adapter_that_has_one(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path)
    tokenizer = load_tokenizer(ModelSection(name=str(tmp_path)))
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.save_pretrained(tmp_path)
    for adapter, end in [("auto", "<|end_of_text|>"), ("merge", "<|end_of_text|>"), ("new", "<|eot_id|>")]:
        section = ModelSection(name=str(tmp_path), adapter=adapter, device="cpu")
        assert load_tokenizer(section).eos_token == load_model(section)[1].eos_token == end


def test_a_base_that_begins_with_a_dot_is_relative_to_the_adapter(tiny_llama_folder, tmp_path, monkeypatch):
    tuned = saved_adapter(load(tiny_llama_folder), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "base").symlink_to(tiny_llama_folder)
    path = tmp_path / "run/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../base"}))
    monkeypatch.chdir(tmp_path)
    model = load("run/adapter")
    assert torch.equal(logits(model), tuned)
    model.save_pretrained(tmp_path / "elsewhere")
    saved = json.loads((tmp_path / "elsewhere/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_llama_folder)


def test_quantised_bases_are_not_merged(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path)
    with pytest.raises(ModelError, match=r"merged into nf4 weights without rounding .* model.quantization: none"):
        load(tmp_path, adapter="merge", quantization="nf4")


def test_a_second_adapter_and_full_training_of_one_are_refused(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path)
    model = load(tmp_path)
    for target in ("all-linear", ["q_proj"]):
        with pytest.raises(UsageError, match="the model has an adapter already"):
            attach_lora(model, LoraSection(target_modules=target), seed=1)
    with pytest.raises(UsageError, match="the model has an adapter already"):
        load_adapter(model, tmp_path)
    with pytest.raises(UsageError, match=r"lora is null, but the model has an adapter.*model.adapter: merge"):
        prepare_full(model)


def test_settings_that_contradict_the_adapter_are_refused(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path)
    model = load(tmp_path)
    continue_adapter(model, LoraSection())
    continue_adapter(model, LoraSection(r=4, lora_alpha=16, bias="none", modules_to_save=[]))
    for fields, words in [
        ({"r": 8}, "lora.r is 8 and the adapter that training continues has 4; leave it out, or set model.adapter"),
        ({"lora_alpha": 1}, "lora.lora_alpha is 1"),
        ({"target_modules": ["q_proj"]}, r"lora.target_modules is \['q_proj'\]"),
        ({"loftq": True}, "lora.loftq is True"),
    ]:
        with pytest.raises(UsageError, match=words):
            continue_adapter(model, LoraSection(**fields))


def test_only_tensors_that_the_settings_name_are_read(tiny_llama_folder, tmp_path):
    base = load(tiny_llama_folder)
    untouched = logits(base)
    saved_adapter(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    embedding = load(tiny_llama_folder).get_input_embeddings().weight.detach().clone()
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, key: embedding}, path)  # as PEFT saves beside an adapter whose vocabulary it thinks changed
    load(tmp_path)
    save_file({**tensors, key: embedding + 1}, path)
    with pytest.raises(ModelError, match=rf"holds {key}, which adapter_config.json does not entitle it to"):
        load(tmp_path)
    assert torch.equal(logits(load(tiny_llama_folder)), untouched)


def test_an_adapter_on_itself_and_a_rank_that_the_file_does_not_hold_are_named(tiny_llama_folder, tmp_path):
    saved_adapter(load(tiny_llama_folder), tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelError, match="the adapter is its own base"):
        load(tmp_path)
    path.write_text(json.dumps({**saved, "r": 5}))
    with pytest.raises(ModelError, match="r is 5 and the largest matrix has rank 4"):
        load(tmp_path)
