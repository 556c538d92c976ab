"""One question with its answer, and helpers shared by all kinds of question."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from random import Random

from demo_data.words import NAMES
from parley.evaluation.demo_scoring import Check

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Exchange:
    """One question with its context ("" for none), the plain answer, and what makes an answer right.

    `key` says which fact the question is about, and in which wording where there are few facts. One key in ten is held
    out: no training row asks it.
    """

    kind: str
    key: tuple[str | int, ...]
    instruction: str
    answer: str
    check: Check = field(repr=False)
    context: str = ""

    @property
    def prompt(self) -> str:
        """What the user says: the context, a blank line, the instruction."""
        return f"{self.context}\n\n{self.instruction}" if self.context else self.instruction

    @property
    def held_out(self) -> bool:
        return zlib.crc32(repr(self.key).encode()) % HELD_OUT_ONE_IN == 0


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plurals(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}{'es' if noun.endswith(('ch', 'sh', 's', 'x')) else 's'}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else plurals(noun)}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def shuffled(rng: Random, sentences: list[str]) -> str:
    return " ".join(rng.sample(sentences, len(sentences)))


def person(rng: Random) -> str:
    """A name: mostly a known one, else made of syllables, so that the model also learns to copy unseen names."""
    if rng.random() < 0.95:
        return rng.choice(NAMES)
    syllables = [
        rng.choice("bdfghjklmnprstvwz") + rng.choice(["a", "e", "i", "o", "u", "ai", "ei", "ou"]) for _ in "12"
    ]
    return "".join([*syllables, rng.choice(["", "", "n", "r", "s", "l", "ck", "na", "ro", "lin"])]).capitalize()


def two_people(rng: Random) -> tuple[str, str]:
    first = second = person(rng)
    while second == first:
        second = person(rng)
    return first, second
