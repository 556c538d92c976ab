"""Flags in a data set that say what is supervised: of a message, of a part, of a span of characters.

    {"role": "assistant", "content": "...", "weight": 0}                         OpenAI; also train, loss_weight
    {"type": "text", "text": "...", "train": false}                              a part
    {"train_detail": [{"begin_offset": 0, "end_offset": 9, "train": false}]}     axolotl; both offsets are included

All become a `weight` from 0 to 1 and `weight_spans` of a message (parley.data.example).
"""

from __future__ import annotations

from typing import Any

from parley.data.example import WEIGHT, WEIGHT_SPANS
from parley.data.values import short
from parley.errors import DataError

FLAGS = ("weight", "loss_weight", "train", "training", "loss", "loss_mask", "train_on_turn", "trainable", "do_train")
ROW_FLAGS = ("weight", "loss_weight", "train")
"""Flags of a whole row; `label` and the like are often classes there."""
_DETAIL = ("train_detail", "training_detail")

Span = list[float]
"""[start, end, weight]: characters of the content, and a weight from 0 to 1."""


def message_weight(turn: dict[str, Any], location: str) -> float | None:
    """Take the flags out of `turn`: their product, None without any."""
    flags = _flags(turn)
    # Removed from the turn: what remains is handed to the template as fields of the message.
    return _product([_weight(turn.pop(flag), f"{location}: {flag!r}") for flag in flags])


def part_weight(part: dict[str, Any], location: str) -> float | None:
    return _product([_weight(part[flag], f"{location}: {flag!r} of a part") for flag in _flags(part)])


def row_weight(row: dict[str, Any], columns: list[str], location: str) -> float | None:
    """The weight of a whole row: the product of its flags in `columns`."""
    return _product([_weight(row[column], f"{location}: field {column!r}") for column in columns])


def _flags(item: dict[str, Any]) -> list[str]:
    flags = [flag for flag in FLAGS if item.get(flag) is not None]
    # A `label` that is not true or false is a class or a name, not a loss flag.
    return [*flags, "label"] if isinstance(item.get("label"), bool) else flags


def spans_of_parts(texts: list[tuple[str, float | None]]) -> dict[str, Any]:
    """The loss keys of a content of several parts, each a text with its weight."""
    if all(weight is None for _, weight in texts):
        return {}
    weights = {weight for text, weight in texts if text}
    # A message's weight also covers its end-of-turn token, which spans of the content do not.
    if len(weights) == 1:
        return {WEIGHT: weights.pop()}
    spans: list[Span] = []
    start = 0
    for text, weight in texts:
        if weight is not None and text:
            spans.append([start, start + len(text), weight])
        start += len(text)
    return {WEIGHT_SPANS: spans} if spans else {}


def weight_spans(turn: dict[str, Any], content: str, location: str) -> list[Span]:
    """Take the spans out of `turn`, sorted. Raises DataError where they overlap or leave `content`."""
    spans = [_span(span, location) for span in _list_of(turn.pop(WEIGHT_SPANS, None), f"{location}: {WEIGHT_SPANS!r}")]
    for name in _DETAIL:
        spans += [
            _detail(item, f"{location}: {name!r}") for item in _list_of(turn.pop(name, None), f"{location}: {name!r}")
        ]
    spans.sort()
    end = 0.0
    for start, stop, _ in spans:
        if not end <= start < stop <= len(content):
            raise DataError(
                f"{location}: the span {start:.0f} to {stop:.0f} overlaps another or leaves its {len(content)} "
                "characters"
            )
        end = stop
    return spans


def _span(value: Any, location: str) -> Span:
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(item) for item in value)):
        raise DataError(f"{location}: {WEIGHT_SPANS!r} holds {short(value)}, wanted [start, end, weight]")
    start, end, weight = value
    return [int(start), int(end), _weight(weight, f"{location}: {WEIGHT_SPANS!r}")]


def _detail(value: Any, location: str) -> Span:
    begin, end = (value.get(f"{edge}_offset") if isinstance(value, dict) else None for edge in ("begin", "end"))
    if begin is None or end is None or not (_is_number(begin) and _is_number(end)):
        raise DataError(f"{location} holds {short(value)}, wanted begin_offset, end_offset and train")
    weight = part_weight(value, location)
    # axolotl's end_offset is the last character, not the one after it.
    return [int(begin), int(end) + 1, 1.0 if weight is None else weight]


def _list_of(value: Any, location: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{location} is {short(value)}, wanted a list of spans")
    return value


def _weight(value: Any, location: str) -> float:
    if isinstance(value, bool | int | float) and 0 <= value <= 1:  # false for a NaN
        return float(value)
    raise DataError(f"{location} is {short(value)}; wanted true, false or a number from 0 to 1")


def _product(weights: list[float]) -> float | None:
    if not weights:
        return None
    product = 1.0
    for weight in weights:
        product *= weight
    return product


def _is_number(value: Any) -> bool:
    # The bound excludes NaN and infinity, which int() does not convert.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
