from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def template(tiny_tokenizer: Any) -> Callable[[str], Any]:
    """`template(source)`: the tiny tokenizer with another chat template."""

    def with_template(source: str) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = source
        return tokenizer

    return with_template
