"""Texts with supervised spans to token ids and masks, control tokens inside content as plain text."""

from __future__ import annotations

import json
import secrets
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from parley.data.control_tokens import ControlTokens, control_tokens
from parley.data.text_regions import Span, WeightedSpan
from parley.errors import DataError


@dataclass(frozen=True)
class MaskedText:
    """A text to encode with its supervised spans, in order.

    excluded: not supervised, even where a token reaches from them into a supervised span with more than white space.
    weighted: loss weights of supervised spans, which are 1 elsewhere; later ones override earlier ones.
    plain: control tokens that are encoded as the characters they are.
    head, tail: token ids before the text, not supervised, and after it, supervised where the text is.
    notes: what the summary counts this row under.
    """

    text: str
    spans: list[Span]
    excluded: list[Span] = field(default_factory=list)
    weighted: list[WeightedSpan] = field(default_factory=list)
    plain: list[Span] = field(default_factory=list)
    head: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rendered:
    """Token ids of one row, (L,), and which of them are supervised, (L,), with their loss weights, (L,).

    `weights` is None where all are 1. `notes`: as in MaskedText.
    """

    input_ids: list[int]
    mask: list[bool]
    weights: list[float] | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    def part(self, start: int, stop: int | None) -> Rendered:
        """The tokens from `start` to before `stop`."""
        weights = self.weights and self.weights[start:stop]
        return Rendered(self.input_ids[start:stop], self.mask[start:stop], weights, self.notes)


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
    mask = token_mask(ids, chars, text, control)
    mask = [False] * len(text.head) + mask + [bool(text.spans)] * len(text.tail)
    weights = token_weights(len(ids), chars, text) if text.weighted else None
    if weights is not None:
        weights = [1.0] * len(text.head) + weights + [1.0] * len(text.tail)
    return Rendered(text.head + ids + text.tail, mask, weights, text.notes)


def token_mask(ids: list[int], chars: Callable[[int], Any], text: MaskedText, control: frozenset[int]) -> list[bool]:
    """Tokens that overlap a span and no excluded one. A token reaches from its predecessor's end, as offsets may leave
    white space out.

    `chars` gives the offsets of a token; asking for the few that matter is quicker than a list of all.
    """
    mask = [False] * len(ids)
    for start, end in text.spans:
        first, stop = _tokens_at(len(ids), chars, start, end)
        if stop < len(ids) and (stop == 0 or chars(stop - 1)[1] < end):
            stop += 1  # a token across the end
        if first < stop and ids[first] in control and chars(first)[0] < start:
            first += 1  # a header's control token that takes in white space after it
        mask[first:stop] = [True] * (stop - first)
    for start, end in text.excluded:
        first, stop = _overlapping(len(ids), chars, start, end)
        # The space between an excluded word and a supervised one is often the first character of the latter's token.
        if first < stop and chars(stop - 1)[1] > end and text.text[chars(stop - 1)[0] : end].isspace():
            stop -= 1
        if first < stop and chars(first)[0] < start and text.text[start : chars(first)[1]].isspace():
            first += 1
        mask[first:stop] = [False] * (stop - first)
    return mask


def token_weights(count: int, chars: Callable[[int], Any], text: MaskedText) -> list[float]:
    """The loss weights of `count` tokens, (L,). A token across an edge has the later span's."""
    weights = [1.0] * count
    for start, end, weight in text.weighted:
        first, stop = _overlapping(count, chars, start, end)
        weights[first:stop] = [weight] * (stop - first)
    return weights


def _tokens_at(count: int, chars: Callable[[int], Any], start: int, end: int) -> tuple[int, int]:
    """The first token that ends after character `start`, and the first that ends after `end`."""
    first, stop = (bisect_right(range(count), edge, key=lambda token: chars(token)[1]) for edge in (start, end))
    return first, stop


def _overlapping(count: int, chars: Callable[[int], Any], start: int, end: int) -> tuple[int, int]:
    """From the first to after the last token that has a character of [start, end)."""
    first, stop = _tokens_at(count, chars, start, end)
    return first, stop + (stop < count and chars(stop)[0] < end)


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
    weighted = [(shifted(start), shifted(end), weight) for start, end, weight in text.weighted]
    there = replace(text, text="".join(parts), spans=spans, excluded=excluded, weighted=weighted)
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
