from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        ({}, ["training.max_steps=x"], "training.max_steps: got 'x'"),
        ({}, ["nonsense"], "wanted section.key=value"),
        ({}, ["a.=1"], "wanted section.key=value"),
        ({"data": {"streaming": True}}, [], "set training.max_steps"),
        ({"lora": {"r": 0}}, [], "lora.r: got 0"),
        ({"lora": 3}, [], "lora"),
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


def test_importing_parley_loads_no_torch() -> None:
    code = (
        "import sys, parley, parley.config; assert parley.__version__; "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
