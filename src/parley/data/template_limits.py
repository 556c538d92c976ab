"""Bounds on what a chat template may take: steps, time, text, numbers.

A template is a program from elsewhere. Jinja's sandbox keeps it from files, and bounds range() alone: 'a' * 10**12,
9**9**9 or nested loops would take all memory or never end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

MAX_STEPS = 20_000_000
"""Rounds of loops and calls in one rendering. 6,000 turns need 18 million where a template looks through all turns at
each turn."""
MAX_SECONDS = 60.0
"""CPU time of the rendering thread. A template cannot wait, so this bounds the time on the clock as well, and a busy
machine stops nothing that would have ended."""
MAX_CHARACTERS = 1 << 27
"""Characters of one string, of all that a rendering writes, or items of one list."""
MAX_SEPARATOR = 1000
"""Characters of what a filter puts between lines, words or items of JSON."""
MAX_WORK = 1 << 35
"""Characters of all strings that one rendering makes, those it throws away included."""
_MAX_BITS = 1 << 14
"""Bits of a number."""
RESIZING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "round"}
"""Methods and filters that take a width."""
_WIDTH = re.compile(r"\d{6,}|\*")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that runs or grows beyond any use."""


def too_long() -> TemplateLimitError:
    return TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses sizes beyond any use."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        check_sizes(args, kwargs)
        return function(*args, **kwargs)

    return with_pass_arg(checked, function)


def with_pass_arg(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapper`, marked as `function` is: whether a filter takes the context or the environment first."""
    for flag in ("jinja_pass_arg",):
        if hasattr(function, flag):
            setattr(wrapper, flag, getattr(function, flag))
    return wrapper


def check_sizes(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > 10_000:
            raise TemplateLimitError(f"it asks for a width of {value:,}")


def check_separator(separator: Any) -> None:
    size = len(separator) if isinstance(separator, str) else separator if isinstance(separator, int) else 0
    if size > MAX_SEPARATOR:
        raise TemplateLimitError(f"it puts {size:,} characters between lines or items")


def check_growth(name: str, text: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse a method of a string whose result would be too long. Checked before the call: a check of the result comes
    when the memory is already allocated."""
    length = len(text)
    if name == "join" and args:
        # A generator is joined part by part elsewhere; its parts are counted as they are made.
        parts = args[0] if isinstance(args[0], list | tuple) else ()
        length = len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, str))
    elif name == "replace" and len(args) > 1:
        old, new = args[0], args[1]
        length += (text.count(old) if old else len(text) + 1) * len(new)
    elif name == "expandtabs":
        length += text.count("\t") * max([8, *(size for size in (*args, *kwargs.values()) if isinstance(size, int))])
    elif name == "translate":
        length *= max(1, _longest(args))
    elif name in ("format", "format_map"):
        length += text.count("{") * _longest([args, kwargs])
    if length > MAX_CHARACTERS:
        raise too_long()


def check_written_format(text: str, values: Any) -> None:
    """Refuse `text % values` where it would be too long."""
    check_format(text)
    if len(text) + text.count("%") * _longest(values) > MAX_CHARACTERS:
        raise too_long()


def _longest(value: Any) -> int:
    """The length of the longest string in nested lists and mappings; of anything else, that of its repr."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return max(map(_longest, value.values()), default=0)
    if isinstance(value, list | tuple):
        return max(map(_longest, value), default=0) + 2 * len(value)
    return 32


def check_format(format: str) -> None:
    if _WIDTH.search(format):
        raise TemplateLimitError("it formats to a width of a million or more")


def check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        check_written_format(left, right)
    for many, times in ((left, right), (right, left)):
        repeated = operator == "*" and isinstance(many, str | list | tuple) and isinstance(times, int)
        if repeated and len(many) * times > MAX_CHARACTERS:
            raise too_long()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
        if bits > _MAX_BITS:
            raise TemplateLimitError(f"it computes a number of more than {_MAX_BITS:,} bits")
