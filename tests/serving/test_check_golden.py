from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from parley.data.golden import golden_ids
from parley.errors import RunError
from parley.serving.check_golden import check_golden


@pytest.fixture
def golden(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(golden_ids(tiny_tokenizer)), encoding="utf-8")
    return path


def test_the_tokenizer_it_was_trained_with_agrees(golden: Path, tiny_tokenizer: Any) -> None:
    assert check_golden(golden, tiny_tokenizer) is None


def test_a_changed_template_is_shown_at_its_first_difference(golden: Path, tiny_tokenizer: Any) -> None:
    changed = copy.deepcopy(tiny_tokenizer)
    changed.chat_template = changed.chat_template.replace(" | trim + '<|eot_id|>'", " | trim + ' <|eot_id|>'")
    difference = check_golden(golden, changed)
    assert difference is not None
    assert difference.conversation == 1
    stored = json.loads(golden.read_text())[0]["input_ids"]
    place = difference.position
    assert stored[place] == tiny_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    said, trained, served = difference.lines()
    assert f"token {place}" in said
    assert f"{stored[place]}:'<|eot_id|>'" in trained
    assert trained.split("trained: ")[1].split()[:3] == served.split("served:  ")[1].split()[:3]
    assert trained.split("trained: ")[1] != served.split("served:  ")[1]


def test_a_changed_generation_prompt_is_found_too(golden: Path, tiny_tokenizer: Any) -> None:
    changed = copy.deepcopy(tiny_tokenizer)
    changed.chat_template = changed.chat_template.replace("{%- if add_generation_prompt %}", "{%- if false %}")
    difference = check_golden(golden, changed)
    assert difference is not None
    assert "(ends here)" not in difference.lines()[1]
    prompt = json.loads(golden.read_text())[0]["prompt_ids"]
    assert difference.position < len(prompt)


def test_a_changed_vocabulary_is_found(golden: Path, tiny_tokenizer: Any) -> None:
    changed = copy.deepcopy(tiny_tokenizer)
    changed.add_tokens(["Hello"])
    difference = check_golden(golden, changed)
    assert difference is not None
    assert "'Hello'" in difference.lines()[2]


def test_a_template_that_refuses_what_was_trained_is_told(golden: Path, tiny_tokenizer: Any) -> None:
    changed = copy.deepcopy(tiny_tokenizer)
    changed.chat_template = "{{ raise_exception('no such turns') }}"
    with pytest.raises(RunError, match=r"golden conversation 1 cannot be rendered.*no such turns"):
        check_golden(golden, changed)


@pytest.mark.parametrize("content", [None, "{", "[1]", '[{"messages": []}]'])
def test_a_run_without_readable_golden_ids_is_not_served(
    tmp_path: Path, tiny_tokenizer: Any, content: str | None
) -> None:
    path = tmp_path / "golden.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=r"golden\.json"):
        check_golden(path, tiny_tokenizer)
