import json
import logging

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from parley.config import LoraSection, ModelSection
from parley.errors import ModelError, ParleyError, UsageError
from parley.models.adapters import attach_lora, load_adapter, prepare_full, trainable_summary
from parley.models.base_answers import is_identity_adapter
from parley.models.load import load_model

IDS = torch.arange(10, 42).view(2, 16)


def load(folder, **fields):
    return load_model(ModelSection(**{"name": str(folder), "device": "cpu", **fields}))[0]


def attach(folder, seed=3407, lora=None, **fields):
    return attach_lora(load(folder, **fields), LoraSection(**{"r": 4, **(lora or {})}), seed=seed)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomise_adapter(model):
    for name, weight in trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_family_attaches_and_learns(family_folder, quantization):
    model = attach(family_folder, quantization=quantization)
    weights = trained(model)
    assert weights
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in weights.items())
    randomise_adapter(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in weights)


def test_sixteen_bit_bases_stay_sixteen_bit_under_an_fp32_adapter(tiny_llama_folder):
    model = attach(tiny_llama_folder, dtype="bfloat16", quantization="nf4")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    kept = {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name or "lm_head" in name}
    assert kept == {torch.bfloat16}


def test_a_new_adapter_changes_nothing(tiny_llama_folder):
    assert torch.equal(logits(attach(tiny_llama_folder)), logits(load(tiny_llama_folder)))


def test_an_adapter_is_identity_adapter_until_it_says_something(tiny_llama_folder, build_family):
    model = attach(tiny_llama_folder)
    assert is_identity_adapter(model)
    randomise_adapter(model)
    assert not is_identity_adapter(model)
    assert not is_identity_adapter(attach(build_family("qwen2"), lora={"bias": "all"}))  # PEFT cannot switch biases off
    assert not is_identity_adapter(
        attach(tiny_llama_folder, lora={"init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]})
    )
    assert not is_identity_adapter(load(tiny_llama_folder))


def test_the_seed_alone_decides_the_start(tiny_llama_folder):
    torch.manual_seed(1)
    first = trained(attach(tiny_llama_folder))
    torch.manual_seed(2)
    second = trained(attach(tiny_llama_folder))
    other = trained(attach(tiny_llama_folder, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_scale_is_alpha_over_r_or_its_root(tiny_llama_folder):
    for fields, scale in [({}, 2.0), ({"use_rslora": True}, 4.0)]:
        model = attach(tiny_llama_folder, lora={"lora_alpha": 8, **fields})
        assert model.get_base_model().model.layers[0].mlp.up_proj.scaling == {"default": scale}


def test_fields_of_peft_reach_it(tiny_llama_folder):
    model = attach(tiny_llama_folder, lora={"use_dora": True, "layers_to_transform": [1], "r": 200})
    names = list(trained(model))
    assert any("lora_magnitude_vector" in name for name in names)
    assert all(".layers.1." in name for name in names)
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_saved_adapter_gives_equal_logits_in_plain_peft(tiny_llama_folder, tmp_path, quantization):
    model = attach(tiny_llama_folder, quantization=quantization)
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_llama_folder)
    assert saved["lora_alpha"] == 16
    assert isinstance(saved["lora_alpha"], int)
    wanted = logits(model)
    assert (wanted - logits(load(tiny_llama_folder, quantization=quantization))).abs().max() > 1e-3
    if quantization == "none":
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path)
        assert torch.equal(logits(plain.eval()), wanted)
    base = load(tiny_llama_folder, quantization=quantization)
    assert torch.equal(logits(load_adapter(base, tmp_path)), wanted)
    by_name = load(tmp_path, quantization=quantization)
    assert isinstance(by_name, PeftModel)
    assert torch.equal(logits(by_name), wanted)


def test_adapter_that_does_not_fit(tiny_llama_folder, build_family, tmp_path):
    model = attach(tiny_llama_folder)
    model.save_pretrained(tmp_path)
    base = load(tiny_llama_folder)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_adapter(base, tiny_llama_folder)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(load(build_family("phi3")), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"r": 4', '"r": 8'))
    with pytest.raises(ModelError, match="does not fit") as caught:
        load_adapter(load(tiny_llama_folder), tmp_path)
    assert "\n" not in str(caught.value)
    config.write_text(text.replace('"down_proj"', '"lm_head"'))
    with pytest.raises(ModelError, match=r"does not fit .*lm_head"):
        load_adapter(load(tiny_llama_folder), tmp_path)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(load(tiny_llama_folder), tmp_path)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapter(load(tiny_llama_folder), tmp_path)


def test_families_with_other_names_get_all_linear_layers_and_a_warning(build_family, caplog):
    with caplog.at_level(logging.WARNING, logger="parley"):
        model = attach(build_family("phi3"))
    assert sorted(model.peft_config["default"].target_modules) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert ["gate_up_proj" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["query"]}, "query matches no module of LlamaForCausalLM; it has down_proj, .*v_proj"),
        ({"target_modules": ["q_proj", "query", "key"]}, "target_modules query, key matches no module"),
        ({"target_modules": []}, "matches no module"),
        ({"target_modules": "model.*query"}, "matches no module; it has"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"layers_to_transform": [9]}, "PEFT cannot attach it"),
        ({"use_rslorra": True}, "unknown key 'lora.use_rslorra' .*did you mean 'use_rslora'"),
        ({"init_lora_weights": "magic"}, "lora: "),
        ({"loftq": True}, "the model is not quantised; set model.quantization: nf4"),
    ],
)
def test_lora_that_cannot_be_is_one_line(tiny_llama_folder, lora, words):
    with pytest.raises(ParleyError, match=words) as caught:
        attach(tiny_llama_folder, lora=lora)
    assert "\n" not in str(caught.value)


def test_a_pattern_and_all_linear_choose_modules(tiny_llama_folder):
    assert len(trained(attach(tiny_llama_folder, lora={"target_modules": r".*\.0\..*(q|v)_proj"}))) == 4
    assert len(trained(attach(tiny_llama_folder, lora={"target_modules": "all-linear"}))) == 2 * 7 * 2


def rounding_left(model, original):
    """||W - (Q + s B A)|| over all adapted layers, for the 16-bit weights W and the NF4 weights Q."""
    total = 0.0
    originals = dict(original.named_modules())
    for path, layer in model.get_base_model().named_modules():
        if path.endswith("_proj"):
            q_NK = dequantize_module_weight(layer.get_base_layer()).float()
            rest_NK = originals[path].weight - q_NK - layer.get_delta_weight("default").float()
            total += rest_NK.detach().square().sum().item()
    return total**0.5


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"lora_alpha": 64}, {"r": 80}])
def test_loftq_makes_up_for_rounding_at_any_scale(tiny_llama_folder, lora):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    plain = rounding_left(attach(tiny_llama_folder, quantization="nf4", lora={"r": 16, **lora}), original)
    model = attach(tiny_llama_folder, quantization="nf4", lora={"r": 16, **lora, "loftq": True})
    assert rounding_left(model, original) < (0.75 if lora != {"r": 80} else 0.05) * plain
    wanted = logits(original)
    base = logits(load(tiny_llama_folder, quantization="nf4"))
    assert (logits(model) - wanted).norm() < 0.9 * (base - wanted).norm()
    again = attach(tiny_llama_folder, quantization="nf4", lora={"r": 16, **lora, "loftq": True})
    assert all(torch.equal(p, trained(again)[name]) for name, p in trained(model).items())


def test_loftq_needs_the_weights_before_rounding(tiny_llama_folder, tiny_tokenizer, tmp_path):
    load(tiny_llama_folder, quantization="nf4").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"needs 16-bit weights, and .* was saved as nf4"):
        attach(tmp_path, lora={"loftq": True})
    with pytest.raises(UsageError, match="use_dora"):
        attach(tiny_llama_folder, quantization="nf4", lora={"loftq": True, "use_dora": True})


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_summary_counts_packed_weights_whole(tiny_llama_folder, quantization):
    # base: 2 x 384 x 64 embeddings and head, 2 layers of 64 x (64 + 32 + 32 + 64) + 3 x 64 x 128, 5 norms of 64
    base = 2 * 384 * 64 + 2 * (64 * 192 + 3 * 64 * 128) + 5 * 64
    added = 2 * 4 * (128 + 96 + 96 + 128 + 3 * 192)
    summary = trainable_summary(attach(tiny_llama_folder, quantization=quantization))
    assert summary == f"{added / 1e3:.3g} k of {base / 1e3:.3g} k parameters are trained ({added / base:.2%})"


def test_full_fine_tuning_trains_everything_that_can_be(tiny_llama_folder):
    model = prepare_full(load(tiny_llama_folder, dtype="float16"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert trainable_summary(model).endswith("(100.00%)")
    for quantization in ("nf4", "int8"):
        with pytest.raises(ModelError, match=f"weights are {quantization} and cannot be trained"):
            prepare_full(load(tiny_llama_folder, quantization=quantization))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_on_a_gpu(family_folder, tmp_path, quantization):
    model = attach(family_folder, quantization=quantization, device="cuda")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    randomise_adapter(model)
    ids = IDS.cuda()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trained(model).values())
    model.save_pretrained(tmp_path)
    base = load(family_folder, quantization=quantization, device="cuda")
    assert torch.allclose(logits(load_adapter(base, tmp_path)), logits(model.eval()), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loftq_on_a_gpu(tiny_llama_folder):
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).cuda()
    lora = {"r": 16, "use_rslora": True}
    plain = rounding_left(attach(tiny_llama_folder, quantization="nf4", device="cuda", lora=lora), original)
    model = attach(tiny_llama_folder, quantization="nf4", device="cuda", lora={**lora, "loftq": True})
    assert rounding_left(model, original) < 0.75 * plain
