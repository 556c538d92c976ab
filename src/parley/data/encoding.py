"""Texts with supervised spans to token ids and masks, control tokens inside content as plain text."""

from __future__ import annotations

import json
import secrets
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from parley.data.control_tokens import ControlTokens, control_tokens
from parley.data.text_regions import Span
from parley.errors import DataError


@dataclass(frozen=True)
class MaskedText:
    """A text to encode with its supervised spans, in order.

    excluded: not supervised, even where a token reaches from them into a supervised span.
    plain: control tokens that are encoded as the characters they are.
    head, tail: token ids before the text, not supervised, and after it, supervised where the text is.
    notes: what the summary counts this row under.
    """

    text: str
    spans: list[Span]
    excluded: list[Span] = field(default_factory=list)
    plain: list[Span] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row, (L,), and which of them are supervised, (L,). `notes`: as in MaskedText."""

    input_ids: list[int]
    mask: list[bool]
    notes: list[str] = field(default_factory=list, compare=False)

    def part(self, start: int, stop: int | None) -> Rendered:
        """The tokens from `start` to before `stop`."""
        return Rendered(self.input_ids[start:stop], self.mask[start:stop], self.notes)


def encode_texts(tokenizer: Any, texts: Sequence[MaskedText]) -> list[Rendered | DataError]:
    """Ids and masks; the tokenizer encodes all texts at once."""
    if not texts:
        return []
    batch = tokenizer(
        [text.text for text in texts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    control = control_tokens(tokenizer)
    rows: list[Rendered | DataError] = []
    for text, ids, encoding in zip(texts, batch["input_ids"], batch.encodings, strict=True):
        try:
            if text.plain:
                rows.append(_encode_plain(tokenizer, text, control))
            else:
                rows.append(_masked(text, ids, encoding.token_to_chars, control.ids))
        except DataError as error:
            rows.append(error)
    return rows


def _masked(text: MaskedText, ids: list[int], chars: Callable[[int], Any], control: frozenset[int]) -> Rendered:
    mask = token_mask(ids, chars, text.spans, text.excluded, control)
    mask = [False] * len(text.head) + mask + [bool(text.spans)] * len(text.tail)
    return Rendered(text.head + ids + text.tail, mask, text.notes)


def token_mask(
    ids: list[int],
    chars: Callable[[int], Any],
    spans: Sequence[Span],
    excluded: Sequence[Span],
    control: frozenset[int],
) -> list[bool]:
    """Tokens that overlap a span and no excluded one. A token reaches from its predecessor's end, as offsets may leave
    white space out.

    `chars` gives the offsets of a token; asking for the few that matter is quicker than a list of all.
    """
    mask = [False] * len(ids)
    tokens = range(len(ids))
    for wanted, edges in [*((True, span) for span in spans), *((False, span) for span in excluded)]:
        start, end = edges
        first, stop = (bisect_right(tokens, edge, key=lambda token: chars(token)[1]) for edge in (start, end))
        if stop < len(ids) and (chars(stop)[0] < end if not wanted else stop == 0 or chars(stop - 1)[1] < end):
            stop += 1  # a token across the end
        if wanted and first < stop and ids[first] in control and chars(first)[0] < start:
            first += 1  # a header's control token that takes in white space after it
        mask[first:stop] = [wanted] * (stop - first)
    return mask


def plain_control_tokens(tokenizer: Any, text: MaskedText) -> list[int]:
    """The ids of `text` with its `plain` spans as characters. For prompts, which have no mask."""
    rendered = _encode_plain(tokenizer, text, control_tokens(tokenizer))
    return rendered.input_ids


def _encode_plain(tokenizer: Any, text: MaskedText, control: ControlTokens) -> Rendered:
    """Control tokens are found by their names: here the template's own have other names, which no text contains."""
    renamed = _renamed(tokenizer, len(tokenizer))
    parts: list[str] = []
    moved: list[Span] = []  # where a name of another length begins in the old text, and the shift from its end on
    plain, at, shift = set(text.plain), 0, 0
    for token in control.pattern.finditer(text.text):
        if token.span() in plain:
            continue
        name = renamed.names[token[0]]
        parts += [text.text[at : token.start()], name]
        shift += len(name) - len(token[0])
        moved.append((token.end(), shift))
        at = token.end()
    parts.append(text.text[at:])
    ends = [end for end, _ in moved]

    def shifted(character: int) -> int:
        index = bisect_right(ends, character) - 1
        return character + (moved[index][1] if index >= 0 else 0)

    encoding = renamed.tokenizer.encode("".join(parts), add_special_tokens=False)
    ids = [renamed.ids.get(id, id) for id in encoding.ids]
    if sum(id in control.ids for id in ids) > len(moved):
        raise DataError("the tokenizer cannot encode control tokens as plain text; set data.control_tokens: tokens")
    spans = [(shifted(start), shifted(end)) for start, end in text.spans]
    excluded = [(shifted(start), shifted(end)) for start, end in text.excluded]
    there = MaskedText("", spans, excluded, head=text.head, tail=text.tail, notes=text.notes)
    return _masked(there, ids, encoding.token_to_chars, control.ids)


@dataclass(frozen=True)
class _Renamed:
    """A tokenizer whose control tokens have random `names`; `ids` are the true ids of its own."""

    tokenizer: Tokenizer
    names: dict[str, str]
    ids: dict[int, int]


@lru_cache(maxsize=2)
def _renamed(tokenizer: Any, size: int) -> _Renamed:  # size: tokens added later make a new entry
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    secret = secrets.token_hex(8)
    names, true_ids = {}, {}
    for token in description["added_tokens"]:
        name = token["content"]
        if token["special"]:
            names[name] = f"\ue0f0{secret}{token['id']:x}\ue0f1"
            name = names[name]
            token |= {"content": name, "normalized": False}
        true_ids[name] = token["id"]
    # Ids and offsets must be of the text alone, as in encode_texts.
    description |= {"post_processor": None, "padding": None, "truncation": None}
    renamed = Tokenizer.from_str(json.dumps(description))
    ids = {added: id for name, id in true_ids.items() if (added := renamed.token_to_id(name)) is not None}
    return _Renamed(renamed, names, ids)
