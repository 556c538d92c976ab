from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parley.config import RunConfig
from parley.errors import UsageError


def test_shorthands_name_the_model_and_the_data() -> None:
    config = RunConfig.create({"model": "m", "data": "d.jsonl"}, ["model.dtype=float16", "training.max_steps=7"])
    assert (config.model.name, config.model.dtype, config.data.source) == ("m", "float16", "d.jsonl")
    assert config.training.max_steps == 7


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig.create({"lora": None, "training": {"neftune_noise_alpha": 5.0}})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config


def test_overrides_leave_the_callers_mapping_alone() -> None:
    values = {"training": {"max_steps": 3}}
    RunConfig.create(values, ["training.max_steps=4"])
    assert values == {"training": {"max_steps": 3}}


@pytest.mark.parametrize(
    ("values", "overrides", "words"),
    [
        ({"modle": 1}, [], "did you mean 'model'"),
        ({"model": {"nmae": 1}}, [], "did you mean 'name'"),
        ({"report": {"exmples": 1}}, [], "did you mean 'examples'"),
        ({"model": {"load_in_4bit": True}}, [], "here it is model.quantization: nf4"),
        ({"data": {"dataset": "a"}}, [], "here it is data.source"),
        ({"base_model": "a"}, [], "here it is model.name"),
        (
            {"base_model": "a", "datasets": [], "lora_r": 8, "output_dir": "b"},
            [],
            "another program's settings; here base_model is model.name; datasets is data.source; lora_r is lora.r",
        ),
        ({}, ["training.max_steps=x"], "training.max_steps: got 'x'"),
        ({}, ["nonsense"], "wanted section.key=value"),
        ({}, ["a.=1"], "wanted section.key=value"),
        ({"data": {"streaming": True}}, [], "set training.max_steps"),
        ({"lora": {"r": 0}}, [], "lora.r: got 0"),
        ({"lora": 3}, [], "lora"),
        ({"qqqq": 1}, [], "it knows data, generation, lora, model, output, report, training"),
        ({"model": {"zzzzzzzzz" * 99: 1}}, [], "unknown key"),
        ({}, ["training.max_steps=0"], "--dry-run trains nothing"),
        ({}, ["training.max_steps=-2"], "at least 1, or -1"),
        ({}, ["training.seed=-1"], "training.seed: got -1"),
        ({}, ["training.seed=4294967296"], "training.seed: got 4294967296"),
        ({}, ["generation.seed=4294967296"], "generation.seed"),
        ({}, ["lora.r=3000000000"], "lora.r: got 3000000000"),
        ({}, ["data.limit=3000000000"], "data.limit"),
        ({}, ["training.learning_rate=.inf"], "training.learning_rate: got inf; wanted a finite number"),
        ({}, ["training.adam_epsilon=.nan"], "training.adam_epsilon: got nan"),
        ({}, ["training.max_grad_norm=[.inf]"], "wanted a finite number"),
        ({}, [f"training.dataset_num_proc={10**30}"], "wanted one of 64 at most"),
        ({}, ['data.system="\\ud83d"'], "data.system: got .*; wanted text without NUL that UTF-8 can hold"),
        ({}, ['output="a\\0b"'], "output: got .*NUL"),
        ({"data": {"columns": {"a\0": "b"}}}, [], "data.columns: got .*NUL"),
        ({"report": {"questions": ["\ud83d"]}}, [], "report.questions"),
        ({}, ["model.name=" + "x" * 256], "a path has at most 4095 bytes, and 255 between"),
        ({}, ["output=" + "x/" * 2100], "a path has at most 4095 bytes"),
        ({}, ["data.source=~no-such-user-here/x"], "~no-such-user-here is no user of this machine"),
        ({"data": [1]}, ["data.limit=3"], r"data is \[1\], which has no keys"),
        ({}, ["data.source={a: [}"], "not valid YAML"),
    ],
)
def test_wrong_settings_are_one_line(values: dict, overrides: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        RunConfig.create(values, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "not valid YAML"), ("- 1", "wanted keys"), (None, "no such file")]
)
def test_a_file_that_is_not_settings(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        RunConfig.from_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["output", "model.name", "model.chat_template", "data.source", "data.heldout"])
def test_the_home_folder_is_expanded_in_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    value: Any = RunConfig.create({}, [f"{key}=~/x"])
    for name in key.split("."):
        value = getattr(value, name)
    assert str(value) == "/home/of/mine/x"


def test_an_override_of_a_shorthand_keeps_its_name() -> None:
    config = RunConfig.create({"model": "m", "lora": None}, ["model.dtype=float16", "lora.r=4"])
    assert config.model.name == "m"
    assert config.lora is not None
    assert config.lora.r == 4


def test_a_value_of_a_whole_file_is_shown_in_part() -> None:
    with pytest.raises(UsageError, match=r"training\.max_steps: got 'xxx") as caught:
        RunConfig.create({}, ["training.max_steps=" + "x" * 100_000])
    assert len(str(caught.value)) < 300


DEFAULTS = {
    "output": "runs/parley",
    "model.name": "parley-demo",
    "model.max_seq_length": 2048,
    "model.double_quantization": True,
    "model.trust_remote_code": False,
    "data.date": "2024-07-26",
    "data.split": "train",
    "data.heldout_rows": 64,
    "data.limit": None,
    "data.streaming": False,
    "lora.r": 16,
    "lora.lora_alpha": 16.0,
    "lora.lora_dropout": 0.0,
    "lora.bias": "none",
    "lora.use_rslora": False,
    "lora.loftq": False,
    "training.engine": "auto",
    "training.memory": "auto",
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 4,
    "training.max_steps": -1,
    "training.num_train_epochs": 1.0,
    "training.learning_rate": 2e-4,
    "training.warmup_steps": 5.0,
    "training.weight_decay": 0.01,
    "training.lr_scheduler_type": "linear",
    "training.gradient_checkpointing": True,
    "training.logging_steps": 1.0,
    "training.save_steps": "auto",
    "training.deterministic": False,
    "training.seed": 3407,
    "generation.max_new_tokens": 512,
    "generation.temperature": 1.5,
    "generation.min_p": 0.1,
    "generation.top_p": 1.0,
    "generation.top_k": 0,
    "generation.repetition_penalty": 1.0,
    "generation.seed": None,
    "report.from_heldout": 4,
    "report.max_new_tokens": 128,
    "report.examples": 4,
}


def test_defaults_are_those_of_the_course(tmp_path: Path) -> None:
    values = RunConfig().model_dump(mode="json")
    for name, expected in DEFAULTS.items():
        value: Any = values
        for key in name.split("."):
            value = value[key]
        assert value == expected, name
    assert values["lora"]["target_modules"] == [f"{part}_proj" for part in ["q", "k", "v", "o", "gate", "up", "down"]]


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("data.limit=1", True),
        ("data.limit=0", False),
        ("training.max_steps=1", True),
        ("training.max_steps=2147483647", True),
        ("training.max_steps=2147483648", False),
        ("training.seed=4294967295", True),
        ("generation.min_p=1", True),
        ("generation.min_p=1.01", False),
        ("generation.top_p=1.01", False),
        ("generation.max_new_tokens=0", False),
        ("report.examples=0", True),
        ("report.examples=-1", False),
        ("model.max_seq_length=8", True),
        ("model.max_seq_length=7", False),
        ("lora.lora_dropout=0.99", True),
        ("lora.r=16384", True),
        ("lora.r=16385", False),
        ("output=" + "x" * 255, True),
        ("output=" + "x" * 256, False),
    ],
)
def test_limits(override: str, allowed: bool) -> None:
    if allowed:
        RunConfig.create({}, [override])
        return
    with pytest.raises(UsageError):
        RunConfig.create({}, [override])


def test_settings_are_written_without_secrets() -> None:
    config = RunConfig.create(
        {
            "training": {
                "hub_token": "s3cret",
                "pad_token": "<pad>",
                "lr_scheduler_kwargs": {"api_key": "s3cret", "deeper": [{"WANDB_API_KEY": "s3cret", "kept": 1}]},
                "run_name": "x hf_abcdefghijklmnopqrstuvwx",
            },
            "model": {"max_seq_length": 64},
        }
    )
    text = config.to_yaml()
    assert "s3cret" not in text
    assert "hf_abc" not in text
    for kept in ("pad_token: <pad>", "kept: 1", "max_seq_length: 64", "run_name: x hf_***"):
        assert kept in text
    assert config.training.model_dump()["hub_token"] == "s3cret"


def test_importing_parley_loads_no_torch() -> None:
    code = (
        "import sys, parley, parley.config; assert parley.__version__; "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_setting_of_another_program_is_one_of_parley_s() -> None:
    from parley.setting_names import _HERE

    values: dict[str, Any] = {}
    for setting in _HERE:
        section, _, name = setting.split(":")[0].split(" ")[0].partition(".")
        known = RunConfig.model_fields
        assert section in known
        if name and section not in ("training", "lora"):  # these take every field of TRL's and PEFT's configs
            annotation: Any = known[section].annotation
            assert name in annotation.model_fields
        elif name:
            values.setdefault(section, {})[name] = None
    from peft import LoraConfig
    from trl import SFTConfig

    assert values["lora"].keys() <= LoraConfig.__dataclass_fields__.keys()
    assert values["training"].keys() - {"method"} <= SFTConfig.__dataclass_fields__.keys()
