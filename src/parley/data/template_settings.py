"""Settings of a chat template (`data.template`, such as enable_thinking) as defaults inside the template itself.

Training, golden ids and every server that reads the tokenizer then write the same text, without arguments they would
have to know. What a caller passes to apply_chat_template still wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.meta

from parley.data.template_environment import Generation
from parley.errors import ModelError

_SETTINGS = re.compile(r"\A(?:\{%- set (\w+) = \1 if \1 is defined else .*? -%\}\n)+")
_FROM_CALLER = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("raise_exception", "strftime_now", "range", "namespace", "dict", "cycler", "joiner", "lipsum"),
}
"""Variables and functions that every chat template has, which are no settings."""


def pin_settings(tokenizer: Any, settings: dict[str, Any]) -> None:
    """Make `settings` the defaults of variables that the chat template reads; a second call replaces the first.

    Raises ModelError for a variable that the template does not read, or a value that Jinja cannot write.
    """
    template = tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template or ""]
    if settings:
        read = set[str]().union(*map(_variables, templates)) - _FROM_CALLER
        for name in settings:
            if name not in read:
                known = ", ".join(sorted(read - set(tokenizer.special_tokens_map))) or "none"
                raise ModelError(f"data.template: the chat template does not read {name!r}; its settings: {known}")
    change_template(tokenizer, lambda template: with_settings(template, settings))


def change_template(tokenizer: Any, change: Callable[[str], str]) -> None:
    """Replace the tokenizer's chat template, or each of several by name, such as default and tool_use."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: change(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = change(template)


def with_settings(template: str, settings: dict[str, Any]) -> str:
    """`template` with `settings` as defaults, in place of those it had."""
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}\n"
        for name, value in settings.items()
    ]
    return "".join(lines) + split_settings(template)[1]


def with_row_settings(template: str, settings: dict[str, Any]) -> str:
    """`template` with `settings` of a row, which win over the defaults it has."""
    return "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in settings.items()) + template


def split_settings(template: str) -> tuple[str, str]:
    """The lines that `with_settings` wrote, and the template behind them."""
    written = _SETTINGS.match(template)
    return template[: written.end() if written else 0], template[written.end() if written else 0 :]


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    raise ModelError(f"data.template: got {value!r}; wanted text, a number, true, false, or a list or mapping of them")


def _variables(template: str) -> set[str]:
    """The variables that a template reads from its caller."""
    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(split_settings(template)[1]))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
