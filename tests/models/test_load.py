"""Real bitsandbytes on the CPU: weights of random models, so figures are distances from the unquantised model."""

import json
import logging
import pickle
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from parley.config import LoraSection, ModelSection
from parley.errors import DeviceError, ModelError
from parley.models import load as load_module
from parley.models.adapters import attach_lora
from parley.models.load import load_model, load_tokenizer
from parley.models.quantization import quantization_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = torch.arange(10, 42).view(2, 16)


def section(folder, **fields):
    return ModelSection(**{"name": str(folder), "device": "cpu", **fields})


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits.float().cpu()


def distance(got, wanted):
    """Relative error in the Euclidean norm."""
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def reference(tiny_llama_folder):
    return logits(AutoModelForCausalLM.from_pretrained(tiny_llama_folder))


def save_quantised(folder, target, quantization):
    model, tokenizer = load_model(section(folder, quantization=quantization))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return logits(model)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_family_loads_as_transformers_does(family_folder):
    model, tokenizer = load_model(section(family_folder))
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(family_folder)))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.name_or_path == str(family_folder)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_sixteen_bits_are_close_to_fp32(tiny_llama_folder, reference, dtype, tolerance):
    model, _ = load_model(section(tiny_llama_folder, dtype=dtype))
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert 0 < distance(logits(model), reference) < tolerance


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 0.2), ("int8", 0.03)])
def test_quantised_while_loading_is_close_and_survives_saving(
    tiny_llama_folder, reference, tmp_path, quantization, tolerance
):
    before = save_quantised(tiny_llama_folder, tmp_path, quantization)
    assert 0.001 < distance(before, reference) < tolerance
    for wanted in ("auto", quantization):
        model, _ = load_model(section(tmp_path, quantization=wanted))
        assert quantization_of(model.config) == quantization
        assert torch.equal(logits(model), before)


def test_double_quantization_is_as_asked(tiny_llama_folder):
    for asked in (True, False):
        model, _ = load_model(section(tiny_llama_folder, quantization="nf4", double_quantization=asked))
        assert model.model.layers[0].self_attn.q_proj.weight.quant_state.nested is asked


def test_saved_compute_type_gives_way_to_this_machines(tiny_llama_folder, tmp_path):
    save_quantised(tiny_llama_folder, tmp_path, "nf4")
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path, quantization_config={**saved, "bnb_4bit_compute_dtype": "bfloat16"})
    model, _ = load_model(section(tmp_path))
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.float32
    assert model.dtype == torch.float32


def test_contradicting_a_quantised_checkpoint_is_an_error(tiny_llama_folder, tmp_path):
    save_quantised(tiny_llama_folder, tmp_path, "nf4")
    for wanted in ("int8", "none"):
        with pytest.raises(ModelError, match=f"model.quantization is {wanted} and the checkpoint was saved as nf4"):
            load_model(section(tmp_path, quantization=wanted))


def test_eight_bit_casts_are_logged_once(tiny_llama_folder, caplog):
    model, _ = load_model(section(tiny_llama_folder, quantization="int8"))
    with caplog.at_level(logging.WARNING, logger="bitsandbytes"):
        logits(model)
        logits(model)
    assert len([record for record in caplog.records if "will be cast" in record.getMessage()]) <= 1


def test_local_folders_open_no_connection(tiny_llama_folder, monkeypatch):
    def refuse(*args):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_model(section(tiny_llama_folder))


def test_without_config_or_weights(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ModelError, match="has no weights"):
        load_model(section(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(section(folder))


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "klingon"}'])
def test_unusable_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        load_model(section(folder))
    assert "\n" not in str(caught.value)


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not safetensors" * 100, b""):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"weights in .* are damaged .*download them again"):
            load_model(section(folder))


def test_damaged_pickles(folder):
    (folder / "model.safetensors").unlink()
    for damaged in (pickle.dumps(print), b""):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(ModelError) as caught:
            load_model(section(folder))
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # torch advises to execute what is in the file
        assert ".safetensors" in str(caught.value) or not damaged


@pytest.mark.parametrize(
    ("fields", "library"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "gptqmodel"),
    ],
)
def test_a_checkpoint_of_a_method_that_is_not_installed(folder, fields, library):
    """The advice is not to set model.quantization to what is refused next."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": fields}))
    with pytest.raises(ModelError, match=f"{library}.*give the checkpoint that {fields['quant_method']} was made from"):
        load_model(section(folder))


def test_absent_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded: .*model-00002"):
        load_model(section(folder))


def test_weights_with_gaps_are_refused_without_a_report(folder, caplog):
    path = folder / "model.safetensors"
    weights = load_file(path)
    key = "model.layers.1.mlp.up_proj.weight"
    for changed, words in [
        ({k: v for k, v in weights.items() if k != key}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({**weights, key: torch.zeros(2, 2)}, "has the wrong shape for model.layers.1.mlp.up_proj.weight"),
    ]:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            load_model(section(folder))
    assert not caplog.records


def test_ignored_weights_are_logged(folder, caplog):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.9.extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    load_model(section(folder))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 1 weights are not part of the model and are ignored (model.layers.9.extra.weight ...)"
    ]


def test_models_that_do_not_continue_text_are_refused(tmp_path, tiny_tokenizer):
    bert = BertConfig(vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    t5 = T5Config(vocab_size=384, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    for name, model in [("bert", BertForMaskedLM(bert)), ("t5", T5ForConditionalGeneration(t5))]:
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"got {type(model).__name__}, wanted a causal language model"):
            load_model(section(tmp_path / name))


def test_longer_than_the_models_positions(tiny_llama_folder):
    with pytest.raises(ModelError, match=r"max_seq_length is 4096 and the model has 2048 positions; set .*: 2048"):
        load_model(section(tiny_llama_folder, max_seq_length=4096))


def test_tokenizers_with_more_words_than_embeddings_are_refused(folder, tmp_path):
    """Of the model itself, and of an adapter that brings its own."""
    tokenizer = load_tokenizer(section(folder))
    attach_lora(load_model(section(folder))[0], LoraSection(r=4), seed=1).save_pretrained(tmp_path / "adapter")
    tokenizer.add_tokens(["ahoy-matey"])
    for target in (tmp_path / "adapter", folder):
        tokenizer.save_pretrained(target)
        for load in (load_model, load_tokenizer):
            with pytest.raises(ModelError, match=r"'ahoy-matey' has the id 384 and the model 384 embeddings") as caught:
                load(section(target))
            assert "\n" not in str(caught.value)


def with_image_token(folder):
    """As Gemma 3's text models: the tokenizer names a token of pictures that has no embedding."""
    tokenizer = load_tokenizer(section(folder))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_special_tokens_without_an_embedding_are_left_out(folder, tmp_path, tiny_tokenizer):
    attach_lora(load_model(section(folder))[0], LoraSection(r=4), seed=1).save_pretrained(tmp_path / "adapter")
    stock = with_image_token(folder)
    stock.save_pretrained(tmp_path / "adapter")
    assert stock("<image_soft_token>", add_special_tokens=False)["input_ids"] == [384]
    for target in (folder, tmp_path / "adapter"):
        for tokenizer in (load_model(section(target))[1], load_tokenizer(section(target))):
            assert len(tokenizer) == 384
            assert tokenizer.all_special_tokens == tiny_tokenizer.all_special_tokens
            assert tokenizer.chat_template == tiny_tokenizer.chat_template
            text = "a<image_soft_token><|eot_id|>"
            assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
            assert tokenizer.name_or_path == str(target)


def test_a_pad_token_without_an_embedding_gives_way_to_another(folder):
    tokenizer = load_tokenizer(section(folder))
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(folder)
    model, loaded = load_model(section(folder))
    assert (loaded.pad_token, len(loaded)) == ("<|finetune_right_pad_id|>", 384)
    assert model.config.pad_token_id == loaded.pad_token_id


@pytest.mark.parametrize("use", ["eos", "template"])
def test_special_tokens_in_use_need_an_embedding(folder, use):
    tokenizer = with_image_token(folder)
    if use == "eos":
        tokenizer.eos_token = "<image_soft_token>"
    else:
        tokenizer.chat_template += "<image_soft_token>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"'<image_soft_token>' has the id 384 and the model 384 embeddings"):
        load_tokenizer(section(folder))


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceError, "do not fit into A GPU .*quantization: nf4"),
        (ImportError("bitsandbytes is not installed"), ModelError, "bitsandbytes is not installed.*parley doctor"),
    ],
)
def test_faults_of_the_machine(tiny_llama_folder, monkeypatch, fault, kind, words):
    """Raised by hand: no test may exhaust a GPU or take away a package."""

    def fail(*args, **kwargs):
        raise fault

    monkeypatch.setattr(load_module.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(load_module, "describe_device", lambda device: "A GPU with 1.0 GiB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**30))
    with pytest.raises(kind, match=words) as caught:
        load_model(section(tiny_llama_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 0.03), ("int8", 0.05), ("nf4", 0.25)])
def test_on_a_gpu(tiny_llama_folder, reference, tmp_path, quantization, tolerance):
    model, tokenizer = load_model(section(tiny_llama_folder, quantization=quantization, device="cuda"))
    assert model.device.type == "cuda"
    assert distance(logits(model), reference) < tolerance
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(section(tmp_path, device="cuda"))
    assert distance(logits(again), logits(model)) < 0.01


@pytest.mark.gpu
@needs_gpu
def test_nf4_checkpoints_of_a_gpu_load_on_the_cpu(tiny_llama_folder, tmp_path):
    model, tokenizer = load_model(section(tiny_llama_folder, quantization="nf4", device="cuda"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    on_cpu, _ = load_model(section(tmp_path))
    assert distance(logits(on_cpu), logits(model)) < 0.05
