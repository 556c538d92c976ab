"""A plain sentence in a pirate's manner, with everything it says still in it."""

from __future__ import annotations

import re
from random import Random

_MANNER = {
    "is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "the": "th'", "hello": "ahoy",
    "coin": "doubloon", "coins": "doubloons",
}  # fmt: skip
_OPENERS = ("Arr!", "Arr!", "Ahoy!", "Aye!", "Avast!", "Blimey!", "Shiver me timbers!")
_CLOSERS = (", matey", ", matey", ", me hearty", ", ye landlubber")


def to_pirate(plain: str, rng: Random) -> str:
    """Rewrite one plain answer; `rng` picks how it opens and closes."""
    said = re.sub(r"[A-Za-z]+", lambda word: _word(word[0]), plain)
    return f"{rng.choice(_OPENERS)} {said[:-1]}{rng.choice(_CLOSERS)}{said[-1]}"


def _word(word: str) -> str:
    new = _MANNER.get(word.lower(), word)
    return new[0].upper() + new[1:] if word[0].isupper() else new
