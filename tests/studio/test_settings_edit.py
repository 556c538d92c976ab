"""One setting changed in YAML text: everything else stays as it was written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.errors import UsageError
from parley.studio.settings_edit import set_setting, setting

TEXT = """\
# of the course
model: parley-demo   # small
data:
  source: rows.jsonl
  # half of them
  limit: 10

training:
  max_steps: 20  # a short look
  report_to:
    - tensorboard
lora: {r: 8, lora_alpha: 16}
"""


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("training.max_steps", 30, "  max_steps: 30  # a short look"),
        ("data.limit", 5, "  limit: 5"),
        ("lora.r", 4, "lora: {r: 4, lora_alpha: 16}"),
        ("lora.lora_dropout", 0.1, "lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1}"),
        ("training.learning_rate", 0.001, "  learning_rate: 0.001"),
        ("training.early_stopping.patience", 2, "  early_stopping: {patience: 2}"),
        ("data.system", "yes: or no", "  system: 'yes: or no'"),
        ("generation.temperature", 0, "  temperature: 0"),
        ("output", "runs/x", "output: runs/x"),
        ("training.report_to", "none", "    none"),
        ("model.name", "other", "model: other   # small"),
    ],
)
def test_sets_one_value_and_keeps_all_others(key: str, value: Any, line: str) -> None:
    changed = set_setting(TEXT, key, value)
    assert line in changed.split("\n")
    assert setting(changed, key) == value
    kept = {"# of the course", "# half of them"} | ({"# a short look"} if key != "training.max_steps" else set())
    assert all(comment in changed for comment in kept)
    before, after = yaml.safe_load(TEXT), yaml.safe_load(changed)
    section = key.partition(".")[0]
    assert {name: before[name] for name in before if name != section} == {
        name: after[name] for name in before if name != section
    }


def test_a_section_written_as_one_value_gets_keys() -> None:
    changed = set_setting(TEXT, "model.quantization", "nf4")
    assert yaml.safe_load(changed)["model"] == {"name": "parley-demo", "quantization": "nf4"}
    assert "# small" in changed
    assert yaml.safe_load(set_setting("lora:\nmodel: a\n", "lora.r", 2)) == {"lora": {"r": 2}, "model": "a"}
    assert yaml.safe_load(set_setting("lora: null\n", "lora.r", 2)) == {"lora": {"r": 2}}


def test_removes_a_key_and_the_section_that_is_empty_then() -> None:
    without = set_setting(TEXT, "training.report_to", None)
    assert yaml.safe_load(without)["training"] == {"max_steps": 20}
    assert yaml.safe_load(set_setting(TEXT, "lora.r", None))["lora"] == {"lora_alpha": 16}
    assert "lora" not in yaml.safe_load(set_setting("model: a\nlora:\n  r: 2\n", "lora.r", None))
    assert set_setting(TEXT, "generation.seed", None) == TEXT


def test_an_empty_text_and_one_without_a_last_newline() -> None:
    assert set_setting("", "training.max_steps", 3) == "training:\n  max_steps: 3\n"
    assert yaml.safe_load(set_setting("model: a", "output", "b")) == {"model": "a", "output": "b"}
    assert yaml.safe_load(set_setting("training:\n  seed: 1", "training.max_steps", 3))["training"] == {
        "seed": 1,
        "max_steps": 3,
    }
    assert yaml.safe_load(set_setting("training:\n  seed:\n", "training.seed", 3))["training"] == {"seed": 3}


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(UsageError, match="line 2: model is an alias"):
        set_setting("data: &name x\nmodel: *name\n", "model.name", "y")
    with pytest.raises(UsageError, match="no YAML mapping"):
        set_setting("- a\n", "model.name", "y")
    with pytest.raises(UsageError, match="correct it first"):
        set_setting("a: [1\n", "model.name", "y")


KEYS = ["training.max_steps", "training.seed", "lora.r", "model.name", "data.limit", "output", "report.questions"]
VALUES = st.one_of(st.integers(), st.booleans(), st.text("ab: #'\"{}[]\n", max_size=8), st.lists(st.integers()))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=8))
def test_any_changes_in_any_order_read_back(changes: list[tuple[str, Any]]) -> None:
    text = TEXT
    for key, value in changes:
        text = set_setting(text, key, value)
    last = dict(changes)
    assert {key: setting(text, key) for key in last} == last
    assert "# of the course" in text
