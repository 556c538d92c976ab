from __future__ import annotations

import locale
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from parley.data.date import formatted, pin_date, pinned
from parley.errors import ModelError

HELLO = [{"role": "user", "content": "Hello?"}]
LLAMA3 = (Path(__file__).parent / "templates" / "llama3.jinja").read_text(encoding="utf-8")


def written(tokenizer: Any, **arguments: Any) -> str:
    return tokenizer.apply_chat_template(HELLO, tokenize=False, **arguments)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    before = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = LLAMA3
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = before


def test_the_date_is_held_and_can_be_held_again(tokenizer: Any) -> None:
    today = written(tokenizer)
    pin_date(tokenizer)
    assert "Today Date: 26 Jul 2024\n" in written(tokenizer)
    once = tokenizer.chat_template
    pin_date(tokenizer, date(2031, 3, 1))
    assert "Today Date: 01 Mar 2031\n" in written(tokenizer)
    pin_date(tokenizer)
    assert tokenizer.chat_template == once
    assert once.splitlines()[1:] == LLAMA3.splitlines()  # one line before the template, which is otherwise its own
    assert written(tokenizer).split("\n")[3:] == today.split("\n")[3:]


def test_a_date_given_wins(tokenizer: Any) -> None:
    pin_date(tokenizer)
    assert "Today Date: 1 May 1999\n" in written(tokenizer, date_string="1 May 1999")


def test_every_format_wherever_it_is_written(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{%- macro day() %}{{ strftime_now('%A') }}{% endmacro %}{%- set long = \"%B %d, %Y\" %}"
        "{%- for message in messages %}{{ day() }} {{ strftime_now(long) }} {{ strftime_now('%d') | int - 1 }}"
        "{% generation %}{{ strftime_now('\"%j\"') }}{% endgeneration %}{% endfor %} {{ strftime_now('un' ~ 'known') }}"
    )
    pin_date(tokenizer, date(2024, 7, 26))
    assert written(tokenizer) == 'Friday July 26, 2024 25"208" 2024-07-26'


def test_templates_without_a_date_stay_as_they_are(tiny_tokenizer: Any) -> None:
    before = tiny_tokenizer.chat_template
    pin_date(tiny_tokenizer)
    assert tiny_tokenizer.chat_template == before
    assert pinned("{# strftime_now #}{{ 'strftime_now()' }}", date(2024, 7, 26)).startswith("{#")


def test_named_templates_are_each_held(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": LLAMA3, "tool_use": "{{ strftime_now('%Y') }}"}
    pin_date(tokenizer, date(2031, 3, 1))
    assert "01 Mar 2031" in written(tokenizer)
    assert written(tokenizer, tools=[{"type": "function", "function": {"name": "a"}}]) == "2031"


def test_names_do_not_follow_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert formatted(date(2024, 7, 6), "%a %A %b %B %p %% %-d %y %H:%M") == "Sat Saturday Jul July AM % 6 24 00:00"
    assert formatted(date(2024, 7, 6), "%c|%x|%X") == "Sat Jul  6 00:00:00 2024|07/06/24|00:00:00"
    assert locale.setlocale(locale.LC_TIME)  # asked, not set: the test leaves the process as it is


def test_a_broken_template_is_one_line() -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        pinned("{{ strftime_now('%d' }", date(2024, 7, 26))
