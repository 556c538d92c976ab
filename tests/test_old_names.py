"""Module names of the version before are read, with a line that says the new one."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("parley.generation.generate", "parley.inference.generate", "generate"),
        ("parley.generation.chat", "parley.inference.chat", "ChatSession"),
        ("parley.road", "parley.pipeline", "train"),
    ],
)
def test_an_old_module_has_the_names_of_the_new_one(old: str, new: str, name: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=new):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
