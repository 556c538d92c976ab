"""Wrong fields of a model folder are named, and those of published models are taken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from parley.config import ModelSection
from parley.errors import ModelError
from parley.models.config_fields import check_config
from parley.models.load import load_model


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def write(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: got 0; Input should be greater than or equal to 1"),
        ({"head_dim": 0}, "head_dim: got 0"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "cannot share 3 key-value heads evenly",
        ),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: got '1e-6'; Input should be a valid number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
        ({"dtype": "float99"}, "dtype is 'float99', wanted a floating-point type"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8', wanted a floating-point type"),
        ({"hidden_act": "softmax9"}, "hidden_act is 'softmax9', which transformers does not have"),
        ({"rope_parameters": {"rope_type": "magic"}}, "rope_type 'magic' is none of default, dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor is 0, wanted a number over 0"),
        ({"rope_parameters": {"full": {"rope_type": "magic"}}}, "rope_type 'magic'"),
        ({"attention_dropout": 1.0}, "attention_dropout: got 1.0; Input should be less than 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1000000000"),
        ({"pad_token_id": 384}, "cannot be loaded: Padding_idx must be within num_embeddings"),
        ({"text_config": [1]}, r"text_config is \[1\], wanted an object"),
        ({"text_config": {"model_type": "llama"}}, "text_config, which llama models do not have"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "are not quantised|fp4"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_what_was_wanted(folder, fields, words):
    write(folder, **fields)
    with pytest.raises(ModelError, match=words):
        load_model(ModelSection(name=str(folder), device="cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": None, "torch_dtype": "float16"},
        {"torch_dtype": "float8_e4m3fn"},
        {"dtype": "auto"},
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000}, "full_attention": {}}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}},
        {"intermediate_size": [128, 128], "num_key_value_heads": [2, 2]},
        {"pad_token_id": -1, "eos_token_id": [1, 2], "head_dim": None, "sliding_window": None},
        {"attention_dropout": 0, "rms_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_forms_of_published_models_are_taken(folder, fields):
    write(folder, **fields)
    check_config(folder)


def test_generation_config_and_index_are_checked(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id: got 'x'"):
        load_model(ModelSection(name=str(folder), device="cpu"))
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ModelError, match=r"\.\./x.safetensors is not a file of this folder, and is not followed"):
        load_model(ModelSection(name=str(folder), device="cpu"))


def test_a_checkpoint_that_asks_for_tuples_gives_named_outputs(folder):
    write(folder, return_dict=False)
    model, _ = load_model(ModelSection(name=str(folder), device="cpu"))
    assert model(torch.tensor([[10, 11]])).logits.shape == (1, 2, 384)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, dtype, value):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name].view(-1)[5] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} holds NaN or infinity"):
        load_model(ModelSection(name=str(folder), device="cpu", dtype=dtype))


def test_large_finite_weights_are_taken(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][:] = 6e4  # their sum is past fp16's largest value
    save_file(weights, path, metadata={"format": "pt"})
    load_model(ModelSection(name=str(folder), device="cpu", dtype="float16"))
