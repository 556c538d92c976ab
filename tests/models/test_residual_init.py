"""PiSSA and OLoRA: what is saved is a plain adapter that every reader puts on the untouched base."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from parley import SFTTrainer
from parley.config import LoraSection, ModelSection
from parley.errors import ModelError, UsageError
from parley.models.adapters import attach_lora, load_adapter
from parley.models.base_answers import base_obstacle
from parley.models.load import load_model

IDS = torch.arange(10, 42).view(2, 16)
ROWS = [{"messages": [{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "seven"}]}] * 4
INITS = ["pissa", "pissa_niter_4", "olora"]


def load(folder, **fields):
    return load_model(ModelSection(name=str(folder), device="cpu", **fields))[0]


def attach(folder, init, **fields):
    return attach_lora(load(folder), LoraSection(**{"r": 4, "init_lora_weights": init, **fields}), seed=1).eval()


def train_a_little(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05


@torch.no_grad()
def logits(model):
    return model(IDS).logits.clone()


def close(got, wanted):
    return torch.allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 7, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_saved_adapter_is_plain_lora_on_the_plain_base(tiny_llama_folder, tmp_path, init, more):
    untouched = logits(load(tiny_llama_folder))
    model = attach(tiny_llama_folder, init, **more)
    assert close(logits(model), untouched)
    train_a_little(model)
    wanted = logits(model)
    assert (wanted - untouched).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"]) == (True, 8)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path).eval()
    assert close(logits(plain), wanted)
    again = load_adapter(load(tiny_llama_folder), tmp_path)
    assert close(logits(again), wanted)
    assert base_obstacle(again) is None
    with again.disable_adapter():
        assert torch.equal(logits(again), untouched)
    assert close(logits(model), wanted), "saving changed the model"


@pytest.mark.parametrize("init", INITS)
def test_a_checkpoint_is_loaded_back_to_go_on(tiny_llama_folder, tmp_path, init):
    model = attach(tiny_llama_folder, init)
    train_a_little(model)
    wanted = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    train_a_little(model)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_what_the_trainer_saves_is_plain_and_resumes(tiny_llama_folder, tmp_path):
    _, tokenizer = load_model(ModelSection(name=str(tiny_llama_folder), device="cpu"))

    def trainer(steps):
        args = SFTConfig(
            str(tmp_path), max_steps=steps, save_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            learning_rate=1e-3, lr_scheduler_type="constant",
        )  # fmt: skip
        return SFTTrainer(
            attach(tiny_llama_folder, "pissa"), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
        )

    first = trainer(2)
    first.train()
    wanted = logits(first.model.eval())
    checkpoint = tmp_path / "checkpoint-2"
    assert close(logits(load_adapter(load(tiny_llama_folder), checkpoint)), wanted)
    assert not close(wanted, logits(load(tiny_llama_folder)))
    second = trainer(3)
    second.train(resume_from_checkpoint=str(checkpoint))
    uninterrupted = trainer(3)
    uninterrupted.train()
    assert close(logits(second.model.eval()), logits(uninterrupted.model.eval()))
    assert not close(logits(second.model), wanted)


def test_what_cannot_be_converted_is_refused(tiny_llama_folder):
    for fields, words in [
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "allows neither rank_pattern nor alpha_pattern"),
        ({"use_dora": True}, "exclude each other"),
    ]:
        with pytest.raises(UsageError, match=words):
            attach(tiny_llama_folder, "pissa", **fields)
    with pytest.raises(UsageError, match=r"olora changes the base's weights and they are nf4; set model.quantization"):
        attach_lora(load(tiny_llama_folder, quantization="nf4"), LoraSection(init_lora_weights="olora"), seed=1)


def test_adapters_saved_without_conversion_load_where_their_start_is_known(tiny_llama_folder, tmp_path):
    """As PEFT saves them unless told otherwise."""
    for init in ("pissa", "olora", "pissa_niter_4"):
        config = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), config).eval()
        train_a_little(model)
        model.save_pretrained(tmp_path / init)
        if "niter" in init:
            with pytest.raises(ModelError, match=r"pissa_niter_4, at random, and saved without that start"):
                load_adapter(load(tiny_llama_folder), tmp_path / init)
            continue
        again = load_adapter(load(tiny_llama_folder), tmp_path / init)
        assert close(logits(again), logits(model))
        assert f"{init} moved a part" in base_obstacle(again)
