"""Model folders of every wrong form: each ends in one clear line, or loads as a model that answers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parley.config import GenerationSection, ModelSection
from parley.inference.generate import generate
from parley.models.load import load_model, load_tokenizer

QUESTION = [[{"role": "user", "content": "Ahoy"}]]
SETTINGS = GenerationSection(max_new_tokens=2, temperature=0)
WRONG = [None, True, 0, -1, 7, 2.5, 10**9, "x", [], {"x": 1}]
FIELDS = [
    "architectures", "attention_bias", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
]  # fmt: skip
OTHER_FIELDS: list[dict[str, Any]] = [
    {"architectures": ["BertForMaskedLM"]},
    {"architectures": [7]},
    {"attention_dropout": "x"},
    {"attention_dropout": 2.0},
    {"auto_map": "x"},
    {"auto_map": {"AutoConfig": "missing.Config", "AutoModelForCausalLM": "missing.Model"}},
    {"auto_map": {"AutoModelForCausalLM": "stranger/repository--code.Model"}},
    {"bos_token_id": 10**12},
    {"dtype": "float99"},
    {"dtype": 16},
    {"dtype": "int8"},
    {"torch_dtype": "float8_e9m9"},
    {"torch_dtype": ["bfloat16"]},
    {"eos_token_id": [5, "x"]},
    {"eos_token_id": [10**9]},
    {"hidden_act": "softmax9"},
    {"hidden_act": "__import__('os')"},
    {"initializer_range": "x"},
    {"max_position_embeddings": 10**15},
    {"model_type": "klingon"},
    {"model_type": "bert"},
    {"model_type": "mamba"},
    {"model_type": "../../etc"},
    {"pad_token_id": 384},
    {"pretraining_tp": 0},
    {"quantization_config": "nf4"},
    {"quantization_config": {}},
    {"quantization_config": {"quant_method": "magic"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf9"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": "x"}},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": float("inf")},
    {"rope_parameters": {"rope_type": "magic"}},
    {"rope_parameters": {"rope_type": "linear", "factor": 0}},
    {"rope_parameters": {"rope_type": "linear"}},
    {"rope_parameters": {"rope_type": "llama3", "factor": "x"}},
    {"rope_parameters": {"rope_type": "yarn", "factor": -1, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    {"rope_scaling": {"type": "magic", "factor": 2}},
    {"rope_theta": "x"},
    {"num_attention_heads": 3},
    {"num_key_value_heads": 3},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 1},
    {"text_config": 7},
    {"text_config": {"model_type": "llama"}},
    {"vocab_size": 385},
    {"transformers_version": 7},
    {"use_cache": "x"},
    {"attn_implementation": "magic"},
    {"_attn_implementation": "flash_attention_9"},
    {"id2label": 7},
    {"num_labels": "x"},
    {"is_encoder_decoder": True},
    {"sliding_window": "x"},
    {"torchscript": True},
    {"return_dict": False},
    {"output_attentions": True},
    {"a key": {"of": ["nobody"]}},
]
FILES: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"model"',
    "cut short": b'{"model_type": "llama"',
    "binary": bytes(range(256)),
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "no fields": b"{}",
    "long number": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
}
GENERATION: list[Any] = [
    *FILES.values(),
    {"eos_token_id": "x"},
    {"eos_token_id": [[1]]},
    {"eos_token_id": -5},
    {"eos_token_id": 10**30},
    {"eos_token_id": {}},
    {"pad_token_id": "x"},
    {"temperature": "hot"},
    {"temperature": -1, "do_sample": True},
    {"top_k": "x"},
    {"top_p": 7, "do_sample": True},
    {"max_length": "x"},
    {"max_new_tokens": -3},
    {"num_beams": 10**9},
    {"num_beams": "x"},
    {"cache_implementation": "magic"},
    {"stop_strings": 7},
    {"suppress_tokens": ["x"]},
    {"bad_words_ids": "x"},
    {"forced_eos_token_id": "x"},
    {"compile_config": 7},
    {"watermarking_config": 7},
    {"trust_remote_code": True, "custom_generate": "stranger/code"},
]
TOKENIZER_CONFIG: list[dict[str, Any]] = [
    {"tokenizer_class": "Klingon"},
    {"tokenizer_class": 7},
    {"tokenizer_class": "LlamaTokenizer"},
    {"chat_template": 7},
    {"chat_template": ["x"]},
    {"chat_template": "{% for %}"},
    {"eos_token": 7},
    {"eos_token": None},
    {"eos_token": {"content": "<|eot_id|>", "__type": "AddedToken"}},
    {"eos_token": "never seen"},
    {"pad_token": "[NEW]"},
    {"added_tokens_decoder": 7},
    {"added_tokens_decoder": {"x": {}}},
    {"added_tokens_decoder": {"999": {"content": "far"}}},
    {"model_max_length": "x"},
    {"model_max_length": -1},
    {"auto_map": {"AutoTokenizer": ["missing.T", None]}},
    {"extra_special_tokens": 7},
    {"additional_special_tokens": "x"},
    {"padding_side": "top"},
]


@pytest.fixture
def try_model(
    tiny_llama_folder: Path, tmp_path: Path, outcome_of: Callable[..., str | None]
) -> Callable[..., str | None]:
    """Load a copy of a good model with files changed (bytes, or fields that are added to it; None removes it)."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")

    def attempt(edit: Callable[[Path], Any] | None = None, load: Any = None, **files: Any) -> str | None:
        for name, content in files.items():
            path = folder / f"{name}.json"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
        if edit is not None:
            edit(folder)

        def answer() -> None:
            if load is not None:
                load(ModelSection(name=str(folder), device="cpu"))
                return
            model, tokenizer = load_model(ModelSection(name=str(folder), device="cpu", max_seq_length=64))
            generate(model, tokenizer, QUESTION, SETTINGS, engine="plain")

        return outcome_of(answer)

    return attempt


def _id(value: Any) -> str:
    return str(value)[:40]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", WRONG, ids=_id)
def test_a_field_of_any_value(try_model: Callable[..., str | None], field: str, value: Any) -> None:
    try_model(config={field: value})


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=_id)
def test_other_fields(try_model: Callable[..., str | None], fields: dict[str, Any]) -> None:
    try_model(config=fields)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("file", ["config", "tokenizer", "tokenizer_config"])
def test_a_file_of_any_content(try_model: Callable[..., str | None], file: str, name: str) -> None:
    line = try_model(**{file: FILES[name]})
    if file != "tokenizer_config":
        assert line is not None


@pytest.mark.parametrize("content", GENERATION, ids=_id)
def test_a_generation_config_of_any_content(try_model: Callable[..., str | None], content: Any) -> None:
    try_model(generation_config=content)


@pytest.mark.parametrize("fields", TOKENIZER_CONFIG, ids=_id)
@pytest.mark.parametrize("load", [load_tokenizer, None], ids=["tokenizer", "model"])
def test_a_tokenizer_config_of_any_content(
    try_model: Callable[..., str | None], fields: dict[str, Any], load: Any
) -> None:
    try_model(tokenizer_config=fields, load=load)


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


UP = "model.layers.1.mlp.up_proj.weight"
EDITS: dict[str, Callable[[Path], Any]] = {
    "no tensors": _tensors(dict.clear),
    "NaN": _tensors(lambda t: t.update({UP: t[UP] * float("nan")})),
    "one infinity": _tensors(lambda t: t[UP].view(-1)[:1].fill_(float("inf"))),
    "integers": _tensors(lambda t: t.update({UP: t[UP].to(torch.int64)})),
    "shape": _tensors(lambda t: t.update({UP: t[UP][:3]})),
    "one dimension": _tensors(lambda t: t.update({UP: t[UP].flatten()})),
    "missing": _tensors(lambda t: t.pop(UP)),
    "embedding one row short": _tensors(
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1]})
    ),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "text for weights": lambda folder: (folder / "model.safetensors").write_text("weights"),
    "pickle": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print)),
    ),
    "index of nothing": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors.index.json").write_text("[]"),
    ),
    "index that leads out": lambda folder: (
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors"),
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {UP: "../outside.safetensors"}})
        ),
        (folder / "x.safetensors").write_bytes(b""),
    ),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "config is a folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "code beside it": lambda folder: (folder / "modeling.py").write_text("raise SystemExit(7)"),
}


@pytest.mark.parametrize("name", EDITS)
def test_weights_and_files_of_any_form(try_model: Callable[..., str | None], name: str) -> None:
    line = try_model(EDITS[name])
    assert (line is None) == (name in ("code beside it", "integers")), line
