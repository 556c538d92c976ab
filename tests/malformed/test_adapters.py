"""Adapter folders of every wrong form: each ends in one clear line, or loads as an adapter that computes.

`Case.edit` changes adapter_config.json (a dict of fields, or the file's bytes) or the tensors of a good adapter.
"""

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

from parley.config import LoraSection, ModelSection
from parley.models.adapters import attach_lora, load_adapter
from parley.models.load import load_model, load_tokenizer

IDS = torch.arange(10, 42).view(2, 16)
WRONG = [None, True, 7, -1, 0, 2.5, 10**9, 10**400, "x", "", [], ["x"], [7], {}, {"x": 1}, [[["x"]]]]
FIELDS = [
    "base_model_name_or_path", "bias", "init_lora_weights", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
]  # fmt: skip
ENDLESS = ["(.*)*x", "(a|a)*(.*.*)*y", "(([a-z_.]+)+)+[0-9]z", "(?:(?:.*)*)*q!", "(.*)" * 10 + r"[^\w.]"]
OTHER_FIELDS: list[dict[str, Any]] = [
    {"alpha_pattern": {"q_proj": "x"}},
    {"alpha_pattern": {"q_proj": float("nan")}},
    {"auto_mapping": {"base_model_class": "System", "parent_library": "os"}},
    {"exclude_modules": "(" * 50},
    {"exclude_modules": ENDLESS[0]},
    {"fan_in_fan_out": "yes"},
    {"layer_replication": [[0, 10**9]]},
    {"layer_replication": "x"},
    {"layers_pattern": ENDLESS[1], "layers_to_transform": [0]},
    {"lora_alpha": float("inf")},
    {"lora_bias": 3},
    {"lora_dropout": 1.0},
    {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["no_such_module"]},
    {"rank_pattern": {"(.*)*x": 4}},
    {"rank_pattern": {"q_proj": 10**9}},
    {"rank_pattern": {".*.*.*.*.*.*.*.*x": 4}},
    {"revision": ["main"]},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"target_modules": "("},
    {"target_modules": "no_such_.*"},
    {"target_modules": ["no_such"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": "all-linear"},
    {"target_parameters": ["mlp.no_such"]},
    {"trainable_token_indices": [10**6]},
    {"trainable_token_indices": {"embed_tokens": ["x"]}},
    {"use_dora": True},
    {"use_rslora": "true"},
    {"a_key_of_a_later_release": {"x": 1}},
    {"eva_config": {"rho": -1}},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "pissa_niter_x"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "magic"},
    {"kasa_config": [1]},
    {"arrow_config": {"x": "y"}},
    *({"target_modules": pattern} for pattern in ENDLESS),
    *({"peft_type": kind} for kind in ("IA3", "PROMPT_TUNING", "XLORA", "lora", "LORA\u202e", "ADALORA", "\x1b[31m")),
]
FILES: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"adapter"',
    "cut short": b'{"peft_type": "LORA"',
    "not UTF-8": b'\xff\xfe{"a": 1}',
    "binary": bytes(range(256)),
    "deep": b'{"peft_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two objects": b"{}{}",
    "no fields": b"{}",
    "twice": b'{"peft_type": "LORA", "peft_type": 7}',
}


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: change(value).contiguous() for name, value in tensors.items()})


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "none": dict.clear,
    "one": lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]],
    "one missing": lambda tensors: tensors.pop(A),
    "NaN": _each(lambda value: value * float("nan")),
    "infinite": _set(A, torch.full((4, 64), float("inf"))),
    "integers": _each(lambda value: value.to(torch.int32)),
    "16 bits": _each(lambda value: value.to(torch.bfloat16)),
    "transposed": _each(lambda value: value.t()),
    "no dimensions": _set(A, torch.tensor(1.0)),
    "rank 0": _each(lambda value: value[:0] if value.shape[0] == 4 else value[:, :0]),
    "half of the rank": _each(lambda value: value[:2] if value.shape[0] == 4 else value[:, :2]),
    "embedding": _set(EMBEDDING, torch.zeros(384, 64)),
    "embedding of another size": _set(EMBEDDING, torch.zeros(400, 64)),
    "base layer": _set("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", torch.zeros(64, 64)),
    "norm": _set("base_model.model.model.norm.weight", torch.zeros(64)),
    "head": _set("base_model.model.lm_head.weight", torch.zeros(384, 64)),
    "bias": _set("base_model.model.model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
    "another adapter": _set(A.replace("lora_A", "lora_A.other"), torch.zeros(4, 64)),
    "layer 9": _set(A.replace("layers.0", "layers.9"), torch.zeros(4, 64)),
    "unknown name": _set("\x1b]0;title\x07" + "x" * 999, torch.zeros(2)),
    "no prefix": lambda tensors: [tensors.update({k.partition(".")[2]: tensors.pop(k)}) for k in list(tensors)],
}
WEIGHT_FILES: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "text": b"not safetensors" * 50,
    "huge header": b"\xff" * 8 + b"{}",
    "header of a list": (2).to_bytes(8, "little") + b"[]",
    "offsets past the end": (b := b'{"x":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}')
    and len(b).to_bytes(8, "little") + b,
}


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    base, _ = load_model(ModelSection(name=str(tiny_llama_folder), device="cpu"))
    attach_lora(base, LoraSection(r=4, target_modules=["q_proj", "v_proj"]), seed=1).save_pretrained(folder)
    return folder


@pytest.fixture
def try_loading(
    adapter: Path, tiny_llama_folder: Path, tmp_path: Path, outcome_of: Callable[..., str | None]
) -> Callable[..., str | None]:
    """Load a copy of the good adapter with fields, tensors or whole files changed; it computes, or raises one line."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")

    def attempt(
        fields: dict[str, Any] | None = None,
        edit: Callable[[dict[str, torch.Tensor]], Any] | None = None,
        **files: bytes | None,
    ) -> str | None:
        path = folder / "adapter_config.json"
        if fields is not None:
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        weights = folder / "adapter_model.safetensors"
        if edit is not None:
            tensors = load_file(weights)
            edit(tensors)
            save_file(tensors, weights, metadata={"format": "pt"})
        for target, content in ((path, files.get("config", b"?")), (weights, files.get("weights", b"?"))):
            if content is None:
                target.unlink()
            elif content != b"?":
                target.write_bytes(content)

        def load() -> None:
            base, _ = load_model(ModelSection(name=str(tiny_llama_folder), device="cpu"))
            model = load_adapter(base, folder)
            with torch.no_grad():
                assert torch.isfinite(model(IDS).logits).all()

        return outcome_of(load)

    return attempt


def _id(value: Any) -> str:
    return str(value)[:40]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", WRONG, ids=_id)
def test_a_field_of_any_value(try_loading: Callable[..., str | None], field: str, value: Any) -> None:
    line = try_loading({field: value})
    if field == "peft_type":
        assert line is not None
        assert "peft_type" in line
    if field == "r" and value != 4:
        assert line is not None


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=_id)
def test_other_fields(try_loading: Callable[..., str | None], fields: dict[str, Any]) -> None:
    try_loading(fields)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_without_end_are_named(try_loading: Callable[..., str | None], pattern: str) -> None:
    assert "target_modules" in str(try_loading({"target_modules": pattern}))


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_of_any_content(try_loading: Callable[..., str | None], name: str) -> None:
    assert "adapter_config.json" in str(try_loading(config=FILES[name]))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_any_name_shape_and_value(try_loading: Callable[..., str | None], name: str) -> None:
    line = try_loading(edit=TENSORS[name])
    assert (line is None) == (name == "16 bits"), line


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_weights_file_of_any_content(try_loading: Callable[..., str | None], name: str) -> None:
    assert try_loading(weights=WEIGHT_FILES[name]) is not None


@pytest.mark.parametrize("kind", ["pickle", "of a good adapter"])
def test_pickled_weights_are_not_read(
    try_loading: Callable[..., str | None], tmp_path: Path, adapter: Path, kind: str
) -> None:
    path = tmp_path / "adapter" / "adapter_model.bin"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(print))
    else:
        torch.save(load_file(adapter / "adapter_model.safetensors"), path)
    assert "pickle can run code" in str(try_loading(weights=None))


def _chain(folder: Path, bases: dict[str, str]) -> None:
    for name, base in bases.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder / base) if base else base})
        )


@pytest.mark.parametrize(
    "bases",
    [
        {"a": "a"},
        {"a": "b", "b": "a"},
        {"a": "b", "b": "c", "c": "b"},
        {"a": ""},
        {"a": "nowhere"},
        {chr(97 + i): chr(98 + i) for i in range(20)} | {"u": "a"},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_bases_that_never_end(
    tmp_path: Path, outcome_of: Callable[..., str | None], bases: dict[str, str], load: Callable[..., Any]
) -> None:
    _chain(tmp_path, bases)
    assert outcome_of(lambda: load(ModelSection(name=str(tmp_path / "a"), device="cpu"))) is not None
