"""Settings of a chat template travel in the template."""

from __future__ import annotations

import copy
from datetime import date
from typing import Any

import pytest

from parley.data.date import pin_date
from parley.data.golden import golden_ids
from parley.data.render import render, render_prompt
from parley.data.template_settings import pin_settings, split_settings
from parley.errors import ModelError

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
