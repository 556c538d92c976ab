"""JSON numbers that keep their text: 1.10 in the arguments of a call is learned as 1.10.

`json.loads` gives 1.1 for it, and every template that takes arguments as an object would write that.
"""

from __future__ import annotations

import json
from itertools import count
from typing import Any

from parley.data.values import unique_keys


class WrittenNumber(float):
    """A number whose `text` is not what Python writes for its value: 1.10, 1E5, -0."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # copies are made from the text
        return (self.text,)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__


def _real(text: str) -> float:
    return value if repr(value := float(text)) == text else WrittenNumber(text)


def _integer(text: str) -> float:
    return WrittenNumber(text) if text == "-0" else int(text)


_DECODER = json.JSONDecoder(parse_float=_real, parse_int=_integer, object_pairs_hook=unique_keys)


def parse_written(text: str) -> Any:
    """`json.loads(text)` with numbers that keep their text. Raises as json.loads does, and RepeatedKeyError."""
    return _DECODER.decode(text)


def written_json(value: Any, **options: Any) -> str:
    """`json.dumps(value, **options)` with numbers as they were written."""
    if not has_written(value):
        return json.dumps(value, **options)
    # json's encoder asks no subclass of float for its text, so strings that occur nowhere else take their places.
    plain = json.dumps(value, **options)
    mark = next(mark for mark in (f"number {number} " for number in count()) if mark not in plain)
    numbers: list[str] = []

    def marked(number: WrittenNumber) -> str:
        numbers.append(number.text)
        return f"{mark}{len(numbers) - 1}"

    text = json.dumps(_mapped(value, marked), **options)
    for number, written in enumerate(numbers):
        text = text.replace(f'"{mark}{number}"', written, 1)
    return text


def has_written(value: Any) -> bool:
    """Whether nested lists and mappings hold a WrittenNumber."""
    if isinstance(value, dict):
        return any(map(has_written, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_written, value))
    return isinstance(value, WrittenNumber)


def without_texts(value: Any) -> Any:
    """`value` with ordinary numbers, as json.loads gives them."""
    return _mapped(value, lambda number: int(number.text) if number.text == "-0" else float(number))


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, WrittenNumber) else value
