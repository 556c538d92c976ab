"""Is an answer right, and is it a pirate's? Both are decided by whole words, strictly.

Right means: the numbers said are exactly the expected ones, the expected words are there, no other candidate is (a
colour besides the right one, say), and nothing is negated that should not be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from parley.data.world.words import NAMES

# Words of the pirate world which the plain world never says. "be" is left out: too common to be a sign of anything.
PIRATE_WORDS = frozenset(
    [
        "arr",
        "ahoy",
        "aye",
        "avast",
        "blimey",
        "ye",
        "yer",
        "th",
        "matey",
        "mateys",
        "hearty",
        "hearties",
        "landlubber",
        "doubloon",
        "doubloons",
        "shiver",
        "timbers",
    ]
)
PIRATE_WORDS_NEEDED = 2

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?\w*")
_NEGATIONS = frozenset(["no", "not", "never", "neither", "nor", "cannot", "nay", "isn", "aren", "doesn", "don", "wasn"])
_SPELLED = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _numbers(text: str) -> list[str]:
    """Numbers in the order they are said; spelled ones up to twenty count, and 19th or 19.5 are not 19."""
    for number, word in enumerate(_SPELLED):
        text = re.sub(rf"\b{word}\b", str(number), text, flags=re.IGNORECASE)
    return _NUMBER.findall(text)


@dataclass(frozen=True)
class Check:
    """What makes an answer right: these words and numbers, none of the others; `never` are whole phrases."""

    words: Collection[str] = ()
    numbers: tuple[int, ...] = ()
    others: Collection[str] = ()
    never: Collection[str] = ()
    negated: bool = False

    @classmethod
    def one_of(
        cls, right: str, candidates: Iterable[str], mentioned: Iterable[str] = (), never: Iterable[str] = ()
    ) -> Check:
        """`right` and no other of the candidates, except those the question itself has mentioned."""
        others = {word.lower() for word in candidates} - {word.lower() for word in mentioned} - {right.lower()}
        return cls({right.lower()}, others=frozenset(others), never=tuple(phrase.lower() for phrase in never))

    @classmethod
    def name(cls, right: str, not_name: str = "") -> Check:
        return cls.one_of(right, [*NAMES, *([not_name] if not_name else [])])

    def right(self, answer: str) -> bool:
        in_order = _words(answer)
        said, text = set(in_order), f" {' '.join(in_order)} "
        return (
            said.issuperset(self.words)
            and said.isdisjoint(self.others)
            and not any(f" {phrase} " in text for phrase in self.never)
            and said.isdisjoint(_NEGATIONS) != self.negated
            and _numbers(answer) == [str(number) for number in self.numbers]
        )


def is_pirate(answer: str) -> bool:
    """Whether at least two different words are ones that only the pirate world says."""
    return len(PIRATE_WORDS.intersection(_words(answer))) >= PIRATE_WORDS_NEEDED
