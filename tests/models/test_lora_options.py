"""PEFT's options of an adapter: what is accepted works and survives saving, all else is one line."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from parley import SFTTrainer
from parley.config import GenerationSection, LoraSection, ModelSection, RunConfig
from parley.errors import ParleyError, UsageError
from parley.inference.generate import generate
from parley.models import patterns
from parley.models.adapters import attach_lora, load_adapter
from parley.models.load import load_model
from parley.models.patterns import matching

IDS = torch.arange(10, 42).view(2, 16)
ROWS = [{"messages": [{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "seven"}]}] * 4


def load(folder, **fields):
    return load_model(ModelSection(**{"name": str(folder), "device": "cpu", **fields}))


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request, tiny_llama_folder, tmp_path_factory):
    if request.param == "untied":
        return tiny_llama_folder
    target = tmp_path_factory.mktemp("tied")
    model, tokenizer = load(tiny_llama_folder)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    AutoModelForCausalLM.from_config(model.config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def bare_llama(tiny_llama_folder):
    """A model that every attempt to attach an adapter has to leave alone."""
    return load(tiny_llama_folder)[0]


@torch.no_grad()
def trained(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()(IDS).logits.clone()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": ".*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^model.layers.0.*": 3}},
        {"trainable_token_indices": [20, 30]},
        {"trainable_token_indices": {"embed_tokens": [20]}},
        {"trainable_token_indices": [20], "target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"lora_bias": True},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_an_option_that_is_accepted_works(folder, tmp_path, lora):
    model, tokenizer = load(folder)
    before = model(IDS).logits
    if lora.get("exclude_modules"):
        with pytest.raises(ParleyError, match="PEFT cannot attach it"):
            attach_lora(model, LoraSection(r=4, **lora), seed=1)
        return
    model = attach_lora(model, LoraSection(r=4, **lora), seed=1)
    wanted = trained(model)
    assert (wanted - before).abs().max() > 1e-3
    settings = GenerationSection(max_new_tokens=3, temperature=0)
    question = [[{"role": "user", "content": "Ahoy"}]]
    answers = [generate(model, tokenizer, question, settings, engine=engine) for engine in ("auto", "plain")]
    assert answers[0] == answers[1]
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(load(folder)[0], tmp_path)(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"trainable_token_indices": [10**6]}, "lora: PEFT cannot attach it: index 1000000 is out of bounds"),
        ({"init_lora_weights": "eva"}, "eva is computed from data"),
        ({"init_lora_weights": "corda"}, "corda is computed from data"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga is computed from data"),
        ({"init_lora_weights": "loftq"}, "the model is not quantised; set model.quantization: nf4"),
        ({"modules_to_save": ["norm", "nope"]}, "lora.modules_to_save nope matches no module"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron"),
        ({"rank_pattern": {"(.*)*x": 3}}, "is no plain pattern of module names"),
        ({"rank_pattern": {"q_proj": 10**6}}, "lora.q_proj is 1,000,000; with this model a rank over 1,024 only costs"),
        ({"r": 2000}, "lora.r is 2,000; with this model a rank over 1,024 only costs memory"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "cannot be used when `target_modules` is a str"),
        ({"rank_pattern": {"q_prj": 3}}, "lora.rank_pattern q_prj matches no module"),
        ({"alpha_pattern": {"model.layers.7.*": 3}}, "lora.alpha_pattern .* matches no module"),
        ({"exclude_modules": ["proj"]}, "lora.exclude_modules proj matches no module"),
        ({"exclude_modules": "proj"}, "lora.exclude_modules proj matches no module"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "lora.target_parameters mlp.experts.* matches no"),
        ({"alora_invocation_tokens": [5, 10**6]}, "alora_invocation_tokens: 1000000 is no token of the model"),
        ({"loftq_config": {"loftq_bits": 4}}, "lora.loftq_config .* set lora.loftq: true"),
        ({"qalora_group_size": 32}, "lora.qalora_group_size has no effect without use_qalora: true"),
        ({"velora_config": {"rang": 1}}, "lora.velora_config: unknown key rang; known: "),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(tiny_llama_folder, lora, words):
    with pytest.raises(ParleyError, match=words) as caught:
        attach_lora(load(tiny_llama_folder)[0], LoraSection(**{"r": 4, **lora}), seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoraConfig)])
@pytest.mark.parametrize("value", ["nonsense", ["nonsense"], {"nonsense": 1}, -7], ids=str)
def test_nonsense_is_refused_for_every_field_of_loraconfig(bare_llama, field, value):
    with pytest.raises(ParleyError) as caught:
        attach_lora(bare_llama, RunConfig.create({"lora": {field: value}}).lora, seed=1)
    said = str(caught.value)
    assert "\n" not in said
    assert field in said or "nonsense" in said or str(value) in said or "pip install megatron" in said


def test_peft_spelling_of_loftq_is_parleys_own(tiny_llama_folder):
    model, _ = load(tiny_llama_folder, quantization="nf4")
    spelled = attach_lora(model, LoraSection(r=4, init_lora_weights="loftq"), seed=1)
    own = attach_lora(load(tiny_llama_folder, quantization="nf4")[0], LoraSection(r=4, loftq=True), seed=1)
    assert torch.equal(spelled(IDS).logits, own(IDS).logits)
    assert not torch.equal(own(IDS).logits, load(tiny_llama_folder, quantization="nf4")[0](IDS).logits)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="scipy is there")
def test_a_missing_package_is_named_with_its_command(tiny_llama_folder, tmp_path):
    import json

    attach_lora(load(tiny_llama_folder)[0], LoraSection(r=4), seed=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "loftq"}))
    with pytest.raises(ParleyError, match=r"init_lora_weights is loftq: .*\(pip install scipy\)"):
        load_adapter(load(tiny_llama_folder)[0], tmp_path)


def test_patterns_have_a_time_limit(monkeypatch):
    """`regex` ends the known endless patterns at once, so its time limit is reached by a stand-in."""
    for pattern in ("(.*)*x", "(a|a)*b", r"(([a-z_.]+)+)+[0-9]z"):
        assert matching(pattern, ["model.layers.0.self_attn.q_proj", "b"], "s") == (["b"] if "b" in pattern else [])

    class Slow:
        def fullmatch(self, name, timeout):
            assert 0 < timeout <= 1
            raise TimeoutError

    monkeypatch.setattr(patterns.regex, "compile", lambda pattern: Slow())
    with pytest.raises(UsageError, match=r"s 'x\+': matching takes too long; write a simpler pattern"):
        matching("x+", ["x"], "s")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "`lm_head` is not supported"),
        ({"trainable_token_indices": [20]}, r"trainable_token_indices: the head shares .* modules_to_save"),
    ],
    ids=str,
)
def test_what_trl_cannot_train_is_one_line_before_training(folder, tmp_path, lora, words):
    model, tokenizer = load(folder)
    args = SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)

    def train():
        attached = attach_lora(model, LoraSection(r=4, **lora), seed=1)
        trainer = SFTTrainer(attached, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
        before = [p.detach().clone() for p in attached.parameters() if p.requires_grad]
        trainer.train()
        after = [p for p in attached.parameters() if p.requires_grad]
        assert not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    if "trainable_token_indices" in lora and not model.config.tie_word_embeddings:
        train()
        return
    with pytest.raises((UsageError, ValueError), match=words):
        train()
