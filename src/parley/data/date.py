"""Templates that write today's date, held to one date.

Llama 3.1 and later, Mistral Small 3 and others call `strftime_now(format)`, a function that transformers, vLLM and
llama.cpp give to chat templates. A macro of that name at the head of the template takes its place everywhere, so the
same conversation has the same token ids tomorrow, without arguments that a server would have to know.
"""

from __future__ import annotations

import json
import re
from ast import literal_eval
from datetime import date as Date
from datetime import datetime, time
from typing import Any

import jinja2

from parley.data.template_settings import change_template, split_settings
from parley.errors import ModelError

DEFAULT_DATE = Date(2024, 7, 26)
"""The date that Llama 3's templates write where they know no other."""

_PIN = re.compile(r"\A\{%- macro strftime_now\(format\) -%\}.*?\{%- endmacro %\}\n")
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]


def pin_date(tokenizer: Any, date: Date = DEFAULT_DATE) -> None:
    """Make `tokenizer`'s chat template write `date` wherever it would write today's.

    Templates that write none stay as they are; a second call replaces the first. A `date_string` given to
    apply_chat_template still wins where the template has one. The time of day is midnight.
    """
    change_template(tokenizer, lambda template: pinned(template, date))


def pinned(template: str, date: Date) -> str:
    """`template` with today held to `date`. Raises ModelError where it is not Jinja."""
    settings, template = split_settings(template)
    template = _PIN.sub("", template)
    try:
        tokens = [token for token in jinja2.Environment().lex(template) if token[1] != "whitespace"]
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
    if ("name", "strftime_now") not in [(kind, text) for _, kind, text in tokens]:
        return settings + template
    # Every constant with a directive, called with or not: some templates keep the format in a variable first.
    formats = {literal_eval(text) for _, kind, text in tokens if kind == "string" and "%" in text}
    cases = "".join(
        f"{{%- if format == {json.dumps(pattern)} -%}}{{{{- {json.dumps(formatted(date, pattern))} -}}}}{{%- else -%}}"
        for pattern in sorted(formats)
    )
    otherwise = f"{date.isoformat()}{'{%- endif -%}' * len(formats)}"
    return f"{settings}{{%- macro strftime_now(format) -%}}{cases}{otherwise}{{%- endmacro %}}\n{template}"


def formatted(date: Date, format: str) -> str:
    """strftime at midnight with English names, whatever the locale."""
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    named = {"%A": day, "%a": day[:3], "%B": month, "%b": month[:3], "%h": month[:3], "%p": "AM", "%X": "00:00:00"}
    named["%x"] = date.strftime("%m/%d/%y")
    named["%c"] = f"{day[:3]} {month[:3]} {date.day:2} 00:00:00 {date.year}"
    midnight = datetime.combine(date, time())
    return re.sub("%-?[A-Za-z%]", lambda found: named.get(found[0]) or midnight.strftime(found[0]), format)
