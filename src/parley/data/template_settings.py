"""Settings of a chat template (`data.template`, such as enable_thinking) as defaults inside the template itself.

Training, golden ids and every server that reads the tokenizer then write the same text, without arguments they would
have to know. What a caller passes to apply_chat_template still wins.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Any

import jinja2
import jinja2.meta

from parley.data.template_environment import Generation
from parley.data.values import short, text_of
from parley.errors import ModelError

_SETTINGS = re.compile(r"\A(?:\{%- set (\w+) = \1 if \1 is defined else .*? -%\}\n)+")
_FROM_CALLER = {
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
    *("raise_exception", "strftime_now", "range", "namespace", "dict", "cycler", "joiner", "lipsum"),
}
"""Variables and functions that every chat template has, which are no settings."""
_MAX_DEPTH = 8


def pin_settings(tokenizer: Any, settings: dict[str, Any]) -> None:
    """Make `settings` the defaults of variables that the chat template reads; a second call replaces the first.

    Raises ModelError for a variable that the template does not read, or a value that Jinja cannot write.
    """
    check_settings(tokenizer, settings, "data.template")
    change_template(tokenizer, lambda template: with_settings(template, settings))


def check_settings(tokenizer: Any, settings: dict[str, Any], where: str) -> None:
    """Raise ModelError for a setting that the chat template does not read, or a value that Jinja cannot write."""
    if not settings:
        return
    template = tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template or ""]
    read = set[str]().union(*map(variables, templates)) - _FROM_CALLER - set(tokenizer.special_tokens_map)
    for name, value in settings.items():
        if name not in read:
            known = ", ".join(sorted(read)) or "none"
            raise ModelError(f"{where}: the chat template does not read {short(name)}; its settings: {known}")
        _literal(value, where)


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


def with_row_settings(tokenizer: Any, settings: dict[str, Any]) -> Any:
    """A copy of `tokenizer` whose template has `settings` of a row or a request, which win over its defaults.

    Raises ModelError for a name that a template cannot have for a setting.
    """
    for name in settings:
        # The name becomes a part of the template: anything but a name would be code.
        if not name.isidentifier() or name in _FROM_CALLER:
            raise ModelError(f"chat_template_kwargs: {short(name)} is no setting of a chat template")
    lines = [f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in settings.items()]
    tokenizer = copy.copy(tokenizer)
    change_template(tokenizer, lambda template: "".join(lines) + template)
    return tokenizer


def split_settings(template: str) -> tuple[str, str]:
    """The lines that `with_settings` wrote, and the template behind them."""
    written = _SETTINGS.match(template)
    return template[: written.end() if written else 0], template[written.end() if written else 0 :]


def _literal(value: Any, where: str = "data.template", depth: int = 0) -> str:
    """A value as Jinja writes it."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return str(value).lower()
    if isinstance(value, str) and text_of(value, where) == value:
        return json.dumps(value)
    if isinstance(value, list) and depth < _MAX_DEPTH:
        return f"[{', '.join(_literal(item, where, depth + 1) for item in value)}]"
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        items = [f"{json.dumps(str(key))}: {_literal(item, where, depth + 1)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    wanted = f"text, a number, true, false, or a list or mapping of them, at most {_MAX_DEPTH} deep"
    raise ModelError(f"{where}: got {short(value)}; wanted {wanted}")


@lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """The variables that a template reads from its caller."""
    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(split_settings(template)[1])))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
