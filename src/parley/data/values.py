"""Values of a row: text that a tokenizer can read, and how values are shown in messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any

from parley.errors import DataError


def text_of(value: Any, location: str) -> str:
    """A text field; null is no text. Raises DataError for anything else, and for text that no tokenizer reads."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{location} is {type_name(value)} ({short(value)}), wanted text")
    # ASCII text has no surrogates, and isascii() reads a flag where encode() copies the text.
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise DataError(f"{location} holds half a character ({half}, a lone surrogate); repair the text") from None
    return value


def strings_in(value: Any) -> Iterator[str]:
    """Each string of a nested value, keys included, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)


def short(value: object, quoted: bool = True) -> str:
    """`value` as a message shows it: its repr, bounded in length and depth, without quotes unless `quoted`."""
    shown = _REPR.repr(value)
    return shown if quoted or not isinstance(value, str) else shown[1:-1]


def _bounded_repr() -> reprlib.Repr:
    bounded = reprlib.Repr()  # repr() of a whole field may take seconds, or recurse too deeply
    bounded.maxlevel, bounded.maxlist, bounded.maxdict = 2, 3, 2
    bounded.maxstring = bounded.maxother = bounded.maxlong = 40
    return bounded


_REPR = _bounded_repr()


def type_name(value: object) -> str:
    """The name of a JSON value's type in messages."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    if isinstance(value, float):
        return "a number"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


class RepeatedKeyError(ValueError):
    """A JSON object names a key twice, of which parsing would keep the last silently."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for json's `object_pairs_hook`. Raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise RepeatedKeyError(f"the key {short(repeated)} is twice in {short(found)}; keep one")
    return found
