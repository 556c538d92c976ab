"""transformers' sandbox for chat templates, with limits and origins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.ext import Extension
from jinja2.filters import do_sum, do_wordwrap
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from parley.data.template_limits import (
    RESIZING,
    TemplateLimitError,
    check_format,
    check_growth,
    check_operands,
    check_separator,
    check_sizes,
    check_written_format,
    checked,
)
from parley.data.template_trace import TRACE_FILTERS, first_source, state_of
from parley.data.traced_text import UNKNOWN, SafeText, TracedText, concat, join, runs_of
from parley.data.values import strings_in
from parley.data.written_numbers import written_json


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' tojson (json.dumps with no HTML escapes), with origins, and numbers as they were written."""
    for part in (indent, *(separators or ())):
        check_separator(part)
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = written_json(value, **options)
    source = first_source(value)
    if source is None:
        return text
    if isinstance(value, TracedText):
        inside = text[1:-1]
        middle = value if inside == value else TracedText.of(inside, source, UNKNOWN)
        return concat(['"', middle, '"'])
    return _json_runs(value, text) or TracedText.of(text, source, UNKNOWN)


def _json_runs(value: Any, text: str) -> str | None:
    """`text`, the JSON of `value`, with the origin of every string in it, found in their order."""
    parts: list[str] = []
    at = 0
    # Each search starts where the previous string ended, since the same text may occur several times.
    for item in strings_in(value):
        for ascii_only in (False, True):
            written = json.dumps(item, ensure_ascii=ascii_only)
            start = text.find(written, at)
            if start >= 0:
                break
        else:
            return None
        parts += [text[at:start], _tojson(item, ensure_ascii=ascii_only)]
        at = start + len(written)
    return concat([*parts, text[at:]])


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """transformers' `dict`: what can be called, and nothing to break out by."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class Generation(Extension):
    """TRL's and transformers' `{% generation %}`: here, its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _traced_join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = [item[attribute] for item in value]
    parts = [item if isinstance(item, str) else str(item) for item in value]
    check_growth("join", d, [parts], {})
    return join(d, parts)


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    text = _text(s)
    check_growth("replace", text, [old, new], {})
    return text.replace(old, new, -1 if count is None else count)


def _wordwrap(
    environment: jinja2.Environment,
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    check_separator(wrapstring)
    check_growth("replace", s, ["", wrapstring or ""], {})
    return do_wordwrap(environment, s, width, break_long_words, wrapstring, break_on_hyphens)


def _sum(environment: jinja2.Environment, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):  # lists would be added up, each sum longer than the one before
        raise TemplateLimitError("it adds up what are no numbers")
    return do_sum(environment, iterable, attribute, start)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's indent over traced lines (jinja2.filters.do_indent)."""
    space = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()
    check_growth("join", space, [lines], {})
    rest = [space + line if line or blank else line for line in lines[1:]]
    text = join("\n", [*lines[:1], *rest])
    return space + text if first else text


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return [] if isinstance(value, jinja2.Undefined) else list(value.items())


class Environment(ImmutableSandboxedEnvironment):
    """transformers' sandbox for chat templates (_compile_jinja_template), with limits and origins."""

    # Jinja hands only these operators to call_binop. No other makes a value much larger than its operands.
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols], cache_size=0
        )
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "dict": _Dict()}
        self.globals["namespace"] = Namespace
        del self.globals["lipsum"]  # random text of any requested length
        for name in RESIZING & self.filters.keys():
            self.filters[name] = checked(self.filters[name])
        self.filters |= {"tojson": _tojson, "join": _traced_join, "indent": checked(_indent)}
        self.filters |= {"safe": _safe, "string": _text, "items": _items, "format": _format, "replace": _replace}
        self.filters |= {"wordwrap": pass_environment(checked(_wordwrap)), "sum": pass_environment(_sum)}
        self.filters |= TRACE_FILTERS

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__)
            check_growth("format", value.__self__, args, kwargs)
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            result = left + right
        else:
            check_operands(operator, left, right)
            result = self.binop_table[operator](left, right)
        state_of(context).made(result)
        return result

    # Named as in Jinja's own sandbox, so that a template may pass keyword arguments self, context and obj.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        state = state_of(__context)
        state.step()
        if isinstance(owner, str):
            if name in RESIZING:
                check_sizes(args, kwargs)
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
                __obj = lambda parts, **_: join(owner, parts)  # noqa: E731
            check_growth(name, owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        state.made(result)
        return result


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _safe(value: Any) -> str:
    text = _text(value)
    return SafeText._with(text, runs_of(text))


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    check_written_format(value, kwargs or args)
    return value % (kwargs or args)
