"""Rows that bring token ids: which of them are supervised, from labels or from a mask. Shapes: (T,) throughout."""

from __future__ import annotations

from typing import Any

from parley.data.columns import Fields
from parley.data.control_tokens import IGNORE_INDEX
from parley.data.example import Example
from parley.data.render import Rendered
from parley.data.values import short
from parley.errors import DataError

LARGEST = 2**31 - 1  # ids are kept as int32


def parse_ids(value: Any, location: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{location} is {short(value)}, wanted a list of token ids")
    for token in value:
        # type() because isinstance(True, int): a mask given under the name of the ids is refused.
        if type(token) is not int or not 0 <= token <= LARGEST:
            raise DataError(f"{location} holds {short(token)}, wanted token ids")
    return value


def parse_labels(ids: list[int], fields: Fields) -> tuple[list[int], list[int]]:
    """Ids and labels of a row without its padding. Without labels or a mask, all of it is supervised.

    Raises DataError for columns of another length, and for labels that are not the ids themselves (shifted ones, say).
    """
    labels = _column(fields, "labels", len(ids))
    mask = _mask(fields, "assistant_masks", len(ids))
    attended = _mask(fields, "attention_mask", len(ids))
    if labels is None:
        labels = (
            ids if mask is None else [token if kept else IGNORE_INDEX for token, kept in zip(ids, mask, strict=True)]
        )
    elif mask is not None:
        labels = [label if kept else IGNORE_INDEX for label, kept in zip(labels, mask, strict=True)]
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        # Shifted labels have the right length, and would train each token to predict the one after the next.
        if label not in (token, IGNORE_INDEX):
            raise DataError(
                f"{fields.origin}: label {index + 1} is {short(label)} where the token is {token}; wanted the token "
                f"itself or {IGNORE_INDEX} (labels are not shifted)"
            )
    # Packed rows have no padding: padding tokens would be attended to and would shift the positions.
    if attended is not None:
        ids = [token for token, kept in zip(ids, attended, strict=True) if kept]
        labels = [label for label, kept in zip(labels, attended, strict=True) if kept]
    return ids, labels


def as_rendered(example: Example, vocabulary: int) -> Rendered:
    """A pre-tokenised example as if it had been rendered. Raises DataError for an id that no token has."""
    assert example.input_ids is not None
    assert example.labels is not None
    largest = max(example.input_ids, default=0)
    # On a GPU an id outside the embedding is a device-side assert that names no row.
    if largest >= vocabulary:
        raise DataError(
            f"{example.origin}: token id {largest:,} is not in the model's vocabulary of {vocabulary:,}; the row was "
            "tokenised for another model"
        )
    return Rendered(example.input_ids, [label != IGNORE_INDEX for label in example.labels])


def _mask(fields: Fields, name: str, length: int) -> list[int] | None:
    mask = _column(fields, name, length)
    if mask is not None and not all(item in (0, 1) for item in mask):
        raise DataError(f"{fields.origin}: field {fields.own[name]!r} holds more than zeros and ones")
    return mask


def _column(fields: Fields, name: str, length: int) -> list[int] | None:
    value = fields.value(name)
    if value is None:
        return None
    location = f"{fields.origin}: field {fields.own[name]!r}"
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise DataError(f"{location} is {short(value)}, wanted a list of whole numbers")
    if len(value) != length:
        raise DataError(f"{location} has {len(value):,} entries, where the row has {length:,} token ids")
    return value
