"""No library call between loading and backward changes weights in place: an answer leaves training as it was."""

from __future__ import annotations

import bitsandbytes.nn.modules as bnb_modules
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig

from parley import SFTTrainer
from parley.config import GenerationSection, LoraSection, ModelSection
from parley.inference.generate import generate
from parley.models.adapters import attach_lora
from parley.models.load import load_model

IDS = torch.arange(10, 42).view(2, 16)
QUESTION = [{"role": "user", "content": "How many apples?"}]
ROWS = [{"messages": [*QUESTION, {"role": "assistant", "content": f"There are {n} apples."}]} for n in range(8)]
PREFERENCES = [
    {"prompt": QUESTION, "chosen": [{"role": "assistant", "content": "seven"}], "rejected": [ROWS[0]["messages"][1]]}
]


@pytest.fixture(autouse=True)
def avx512_bf16(monkeypatch):
    """bitsandbytes takes this CPU for one with AVX512-BF16, where it reorders weights."""
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: True)


def load(folder, quantization):
    return load_model(ModelSection(name=str(folder), device="cpu", quantization=quantization))


def attach(model, **fields):
    return attach_lora(model, LoraSection(**{"r": 4, **fields}), seed=1)


def frozen_state(model):
    """Every frozen weight and buffer, with the scales and shapes of quantised ones."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): value.clone()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and "lora_" not in name
    }


def layouts(model):
    return {
        name: (tuple(module.weight.shape), module.weight.quant_state.absmax.dtype, module.weight.quant_state.nested)
        for name, module in model.named_modules()
        if isinstance(module, bnb_modules.Linear4bit)
    }


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    changed = [
        name for name in wanted if got[name].dtype != wanted[name].dtype or not torch.equal(got[name], wanted[name])
    ]
    assert changed == []


def gradients(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def answer(model, tokenizer):
    """Once through each path: ours, transformers' own and a plain forward in evaluation mode."""
    settings = GenerationSection(max_new_tokens=2, temperature=0)
    generate(model, tokenizer, [QUESTION], settings)
    generate(model, tokenizer, [QUESTION], settings, engine="plain")
    model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        model(IDS)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_gradients_are_equal_before_and_after_an_answer(tiny_llama_folder, quantization):
    fresh = gradients(attach(load(tiny_llama_folder, quantization)[0]))
    model, tokenizer = load(tiny_llama_folder, quantization)
    before, layout = frozen_state(model), layouts(model)
    answer(model, tokenizer)
    assert layouts(model) == layout
    model = attach(model)
    answer(model.eval(), tokenizer)
    assert torch.equal(gradients(model), fresh)
    assert fresh.norm() > 0.01
    assert_equal(frozen_state(model), before)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_trl_preference_training_of_a_model_that_answered_leaves_its_base(tiny_llama_folder, tmp_path, quantization):
    model, tokenizer = load(tiny_llama_folder, quantization)
    before = frozen_state(model)
    model = attach(model)
    answer(model, tokenizer)
    args = DPOConfig(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(PREFERENCES), processing_class=tokenizer)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert_equal(frozen_state(trainer.model), before)


def heldout_loss_after_training(model, tokenizer, folder):
    rows = Dataset.from_list(ROWS)
    args = SFTConfig(
        str(folder), max_steps=12, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        max_length=64, seed=1,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, engine="plain")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def test_nf4_with_dropout_learns_as_sixteen_bit_does_after_an_evaluation(tiny_llama_folder, tmp_path):
    losses = {}
    for quantization in ("none", "nf4"):
        model, tokenizer = load(tiny_llama_folder, quantization)
        losses[quantization] = heldout_loss_after_training(attach(model, lora_dropout=0.1), tokenizer, tmp_path)
    (before, after), (before_nf4, after_nf4) = losses["none"], losses["nf4"]
    assert after < before - 1
    assert before_nf4 - after_nf4 > 0.9 * (before - after)


def test_weights_that_an_answer_rearranged_are_put_back_for_training(tiny_llama_folder, tmp_path, caplog):
    """Of a model that transformers loaded and that answered before Parley saw it."""
    _, tokenizer = load(tiny_llama_folder, "none")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, quantization_config=quantization).eval()
    wanted = layouts(model)
    with torch.no_grad():
        model(IDS)
    assert layouts(model) != wanted
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    assert layouts(trainer.model.get_base_model()).items() != {}
    assert [shape for shape, _, _ in layouts(trainer.model).values()] == [shape for shape, _, _ in wanted.values()]
    assert "put back" in caplog.text
