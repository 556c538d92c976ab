"""The tokenizer's control tokens, as text and as ids, and the label of a token that is not supervised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from parley.data.example import Message

IGNORE_INDEX = -100
"""The label of a token that is not supervised: cross-entropy skips it."""


@dataclass(frozen=True)
class ControlTokens:
    """`pattern` finds any of them in text, the longest first; `ids` are their token ids."""

    pattern: re.Pattern[str]
    ids: frozenset[int]


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Every token that `tokenizer` reads as one piece and marks as special: named ones and added ones."""
    return _control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any, size: int) -> ControlTokens:  # size: tokens added later make a new entry
    # all_special_tokens has the named ones (bos, eos, ...); turn tokens such as <|eot_id|> are only added tokens.
    names = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    names |= {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # Alternation takes the first match, so a token must come before its own prefixes. "(?!)" matches nothing.
    longest_first = sorted(names, key=len, reverse=True)
    return ControlTokens(re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), frozenset(names.values()))


def control_tokens_in(tokenizer: Any, messages: list[Message]) -> list[str]:
    """The control tokens in the text of `messages`, sorted."""
    pattern = control_tokens(tokenizer).pattern
    return sorted({found for text in strings(messages) for found in pattern.findall(text)})


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
