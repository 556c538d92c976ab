"""What adapter_config.json may leave out, and what of it is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from parley.models.adapter_files import lora_config, read_adapter_fields

LEAST: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}


def write(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(LEAST | fields), encoding="utf-8")
    return folder


def test_switches_that_a_config_does_not_name_are_off(tmp_path: Path) -> None:
    config = lora_config(read_adapter_fields(write(tmp_path)))
    switches = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "use_qalora", "ensure_weight_tying")
    assert {name: getattr(config, name) for name in switches} == dict.fromkeys(switches, False)
    assert config.init_lora_weights is True


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_a_switch_of_a_newer_peft_that_is_off_is_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        read_adapter_fields(write(tmp_path, use_something_new=value))
    assert caplog.messages == []


@pytest.mark.parametrize("value", [True, 3, "x", {"a": 1}])
def test_an_unknown_setting_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any) -> None:
    with caplog.at_level(logging.WARNING):
        read_adapter_fields(write(tmp_path, use_something_new=value))
    assert "unknown key 'use_something_new' is ignored" in caplog.text


def test_a_long_config_is_read(tmp_path: Path) -> None:
    """An index of a large model has 10 MB, and a list of target modules may be long."""
    read_adapter_fields(write(tmp_path, exclude_modules=[f"model.layers.{n}.mlp.down_proj" for n in range(60_000)]))
    assert (tmp_path / "adapter_config.json").stat().st_size > 2 * 2**20
