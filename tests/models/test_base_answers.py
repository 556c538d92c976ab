"""The base that a tuned model answers with is the untouched model, or is refused."""

from __future__ import annotations

import pytest
import torch

from parley.config import GenerationSection, LoraSection, ModelSection
from parley.errors import ModelError
from parley.inference.chat import ChatSession
from parley.inference.generate import generate
from parley.models.adapters import attach_lora, load_adapter
from parley.models.base_answers import base_obstacle, require_base
from parley.models.load import load_model
from parley.serving.loading import load_for_inference

QUESTIONS = [[{"role": "user", "content": text}] for text in ("Ahoy", "How many apples?")]
GREEDY = GenerationSection(max_new_tokens=6, temperature=0)

ANSWERED = [
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["input_layernorm", "lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"trainable_token_indices": [20, 30]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]
REFUSED = [
    ({"init_lora_weights": "pissa"}, "pissa moved a part of the base's weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 moved"),
    ({"init_lora_weights": "olora"}, "olora moved"),
    ({"bias": "all"}, "bias: all trained the base's own biases"),
    ({"bias": "lora_only"}, "bias: lora_only trained the base's own biases"),
]


def load(folder):
    return load_model(ModelSection(name=str(folder), device="cpu"))


def train_a_little(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize("lora", ANSWERED, ids=str)
def test_base_answers_are_those_of_the_untouched_model(build_family, lora):
    base, tokenizer = load(build_family("qwen2"))
    wanted = generate(base, tokenizer, QUESTIONS, GREEDY)
    model = attach_lora(base, LoraSection(r=4, **lora), seed=1).eval()
    train_a_little(model)
    assert base_obstacle(model) is None
    tuned = [generate(model, tokenizer, QUESTIONS, GREEDY, engine=engine) for engine in ("auto", "plain")]
    assert tuned[0] == tuned[1] != wanted
    for engine in ("auto", "plain"):
        assert generate(model, tokenizer, QUESTIONS, GREEDY, base=True, engine=engine) == wanted


@pytest.mark.parametrize(("lora", "reason"), REFUSED, ids=str)
def test_a_base_that_was_changed_is_refused_wherever_it_is_asked(build_family, tmp_path, lora, reason):
    model, tokenizer = load(build_family("qwen2"))
    model = attach_lora(model, LoraSection(r=4, **lora), seed=1).eval()
    train_a_little(model)
    with pytest.raises(ModelError, match=f"the base model cannot answer: .*{reason}.*open it by its own name"):
        generate(model, tokenizer, QUESTIONS, GREEDY, base=True)
    with pytest.raises(ModelError, match=reason):
        ChatSession(model, tokenizer).use_base = True


def test_trained_or_merged_weights_of_the_base_are_refused(build_family):
    model, tokenizer = load(build_family("qwen2"))
    with pytest.raises(ModelError, match="has no adapter"):
        require_base(model)
    model = attach_lora(model, LoraSection(r=4), seed=1).eval()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"weights of the base are trained too \(.*norm.weight\)"):
        generate(model, tokenizer, QUESTIONS, GREEDY, base=True)
    model.get_base_model().model.norm.weight.requires_grad_(False)
    require_base(model)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        require_base(model)


def test_a_server_offers_no_base_that_was_changed(build_family, tmp_path, caplog):
    folder = build_family("qwen2")
    for number, (lora, names) in enumerate([({"bias": "all"}, 1), ({}, 2)]):
        model, tokenizer = load(folder)
        model = attach_lora(model, LoraSection(r=4, **lora), seed=1)
        train_a_little(model)
        adapter = tmp_path / str(number)
        model.save_pretrained(adapter)
        tokenizer.save_pretrained(adapter)
        source = load_for_inference(str(adapter))
        assert len(source.names) == names
        assert (base_obstacle(source.model) is None) == (names == 2)
    assert ["only the tuned model is served" in record.getMessage() for record in caplog.records].count(True) == 1
    assert base_obstacle(load_adapter(load(folder)[0], tmp_path / "1")) is None
