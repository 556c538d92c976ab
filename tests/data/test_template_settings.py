"""Settings of a chat template travel in the template."""

from __future__ import annotations

import copy
from datetime import date
from typing import Any

import pytest

from parley.data.date import pin_date
from parley.data.example import Example
from parley.data.golden import golden_ids
from parley.data.render import render, render_example, render_prompt
from parley.data.template_settings import pin_settings, split_settings, with_row_settings
from parley.errors import DataError, ModelError

MESSAGES = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ahoy!"}]
TEMPLATE = (
    "{% macro start() %}{% if enable_thinking is defined and not enable_thinking %}quietly {% endif %}{% endmacro %}"
    "{% for m in messages %}{{ m.role + start() + m.content }}<|eot_id|>{% endfor %}{{ strftime_now('%d') if dated }}"
    "{{ names | join(',') if names }}{% if add_generation_prompt %}assistant{{ start() }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_training_prompts_and_golden_ids_agree(tokenizer: Any) -> None:
    wanted = tokenizer.apply_chat_template(MESSAGES, enable_thinking=False, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        MESSAGES[:1], enable_thinking=False, add_generation_prompt=True, return_dict=False
    )
    pin_settings(tokenizer, {"enable_thinking": False})
    assert render(tokenizer, MESSAGES).input_ids == wanted
    assert render_prompt(tokenizer, MESSAGES[:1]) == prompt
    assert "quietly" in tokenizer.decode(golden_ids(tokenizer)[0]["prompt_ids"])
    # A caller that knows the setting still decides.
    loud = tokenizer.apply_chat_template(MESSAGES, enable_thinking=True, tokenize=False)
    assert "quietly" not in loud


def test_settings_and_date_do_not_disturb_each_other(tokenizer: Any) -> None:
    pin_settings(tokenizer, {"dated": True, "names": ["a", "b"], "enable_thinking": None})
    pin_date(tokenizer, date(2024, 7, 26))
    pin_settings(tokenizer, {"dated": True, "names": ["c", 'q"d']})
    pin_date(tokenizer, date(2024, 7, 27))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text.endswith('27c,q"d')
    assert split_settings(tokenizer.chat_template)[0].count("{%- set") == 2
    pin_settings(tokenizer, {})
    assert split_settings(tokenizer.chat_template)[0] == ""


def test_unknown_settings_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="'enable_thinkin'; its settings: dated, enable_thinking, names"):
        pin_settings(tokenizer, {"enable_thinkin": False})
    with pytest.raises(ModelError, match="does not read 'messages'"):
        pin_settings(tokenizer, {"messages": []})
    with pytest.raises(ModelError, match="wanted text, a number"):
        pin_settings(tokenizer, {"dated": date(2024, 1, 1)})


def test_settings_of_a_row_or_a_request_win_over_those_of_the_run(tokenizer: Any) -> None:
    pin_settings(tokenizer, {"enable_thinking": True})
    loud = render_prompt(tokenizer, MESSAGES[:1])
    quiet = render_prompt(with_row_settings(tokenizer, {"enable_thinking": False}), MESSAGES[:1])
    assert "quietly" in tokenizer.decode(quiet)
    assert "quietly" not in tokenizer.decode(loud)
    assert render_prompt(tokenizer, MESSAGES[:1]) == loud  # the tokenizer itself is unchanged


@pytest.mark.parametrize(
    "name", ["a = 1 -%}{{ 'x' * 9 }}{%- set b", "", "messages", "add_generation_prompt", "1a", "a.b"]
)
def test_a_rows_setting_cannot_be_code_or_what_the_caller_gives(tokenizer: Any, name: str) -> None:
    example = Example("row 1", messages=MESSAGES, template={name: 1})
    with pytest.raises(DataError, match="is no setting of a chat template"):
        render_example(tokenizer, example)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud83d", [[[[[[[[[[1]]]]]]]]]], {"a": object()}])
def test_values_that_no_template_takes_are_refused(tokenizer: Any, value: Any) -> None:
    with pytest.raises((ModelError, DataError), match=r"got|holds"):
        pin_settings(tokenizer, {"names": value})
