"""Completion of settings: keys of the section around the cursor, and values of a key."""

from __future__ import annotations

from parley.config_reference import setting_references
from parley.studio.completion import completions

ALL = list(setting_references())


def labels(text: str) -> list[str]:
    """Labels at the end of `text`."""
    lines = text.split("\n")
    return [each.label for each in completions(text, len(lines), len(lines[-1]), ALL)]


def test_sections_and_top_level_keys() -> None:
    assert labels("") == ["data", "generation", "lora", "model", "output", "report", "training"]
    assert labels("tr") == ["training"]


def test_keys_of_the_section_around_the_cursor() -> None:
    assert labels("model: a\ntraining:\n  seed: 1\n  max_") == ["max_steps"]
    assert "quantization" in labels("model:\n  ")
    assert labels("training:\n  early_stopping:\n    pat") == []
    assert labels("training:\n  seed: 1\nlor") == ["lora"]


def test_names_that_begin_so_come_before_those_that_contain_it() -> None:
    assert labels("generation:\n  top") == ["top_k", "top_p", "stop"]


def test_values_of_a_key() -> None:
    assert labels("model:\n  quantization: ") == ["auto", "none", "nf4", "int8"]
    assert labels("model:\n  quantization: n") == ["none", "nf4"]
    assert labels("training:\n  deterministic: t") == ["true"]
    (steps,) = completions("training:\n  max_st", 2, 8, ALL)
    assert (steps.insert, steps.replaces) == ("max_steps: ", 6)
    assert "default -1" in steps.detail


def test_nothing_behind_text_or_outside() -> None:
    assert labels("model: a b") == labels("# tra") == []
    assert completions("model", 7, 0, ALL) == []
