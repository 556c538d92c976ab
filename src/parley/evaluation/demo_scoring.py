"""Scoring of the demo's held-out questions: is an answer right, and is it in pirate speech?

Both are decided by whole words. An answer is right when its numbers are exactly the expected ones, the expected words
occur, no other candidate does (another colour, say), and it negates exactly when the expected answer does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from parley.data.example import Message

_PIRATE = (
    "arr ahoy aye avast blimey ye yer th matey mateys hearty hearties landlubber doubloon doubloons shiver timbers"
)
PIRATE_WORDS = frozenset(_PIRATE.split())
"""Words of pirate speech that the plain answers never use. "be" is left out: it is too common to be evidence."""
PIRATE_WORDS_NEEDED = 2

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?\w*")
# The word pattern splits at apostrophes, so that "isn't" is found as "isn".
_NEGATIONS = frozenset(["no", "not", "never", "neither", "nor", "cannot", "nay", "isn", "aren", "doesn", "don", "wasn"])
_SPELLED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


@dataclass(frozen=True)
class Check:
    """What makes an answer right: all of `words`, exactly `numbers` in their order, none of `others`, and none of the
    phrases in `never`; `negated`: whether it has to contain a negation.
    """

    words: frozenset[str] = frozenset()
    numbers: tuple[int, ...] = ()
    others: frozenset[str] = frozenset()
    never: tuple[str, ...] = ()
    negated: bool = False

    def accepts(self, answer: str) -> bool:
        in_order = words_of(answer)
        words, text = set(in_order), f" {' '.join(in_order)} "
        return (
            words.issuperset(self.words)
            and words.isdisjoint(self.others)
            and not any(f" {phrase} " in text for phrase in self.never)
            # "No, 12 is not even" contains every expected word of "12 is even".
            and words.isdisjoint(_NEGATIONS) != self.negated
            and _numbers(answer) == [str(number) for number in self.numbers]
        )


@dataclass(frozen=True)
class Question:
    """A held-out question. `messages` are the turns up to the one to be answered, `expected` is the plain answer."""

    kind: str
    messages: list[Message]
    expected: str
    check: Check

    def to_json(self) -> dict[str, Any]:
        check = self.check
        stored = {
            # Sorted, so that the generated file does not depend on the hash seed.
            "words": sorted(check.words),
            "numbers": list(check.numbers),
            "others": sorted(check.others),
            "never": list(check.never),
            "negated": check.negated,
        }
        return {"kind": self.kind, "messages": self.messages, "expected": self.expected, "check": stored}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Question:
        stored = row["check"]
        check = Check(
            frozenset(stored["words"]),
            tuple(stored["numbers"]),
            frozenset(stored["others"]),
            tuple(stored["never"]),
            stored["negated"],
        )
        return cls(row["kind"], row["messages"], row["expected"], check)


def heldout_questions() -> list[Question]:
    """The 100 questions that ship with Parley, about facts that no training row of the demo mentions."""
    lines = (files("parley") / "assets" / "demo-data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question.from_json(json.loads(line)) for line in lines]


def rate(questions: Sequence[Question], answers: Sequence[str]) -> tuple[float, float]:
    """(style_rate, accuracy): the shares, from 0 to 1, of answers in pirate speech and of right ones."""
    correct = sum(question.check.accepts(answer) for question, answer in zip(questions, answers, strict=True))
    return sum(map(is_pirate, answers)) / len(answers), correct / len(answers)


def is_pirate(answer: str) -> bool:
    """Whether `answer` has at least two different words of pirate speech."""
    return len(PIRATE_WORDS.intersection(words_of(answer))) >= PIRATE_WORDS_NEEDED


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _numbers(text: str) -> list[str]:
    """Numbers in their order; spelled ones up to twenty count, and 19th or 19.5 are not 19."""
    for number, word in enumerate(_SPELLED.split()):
        text = re.sub(rf"\b{word}\b", str(number), text, flags=re.IGNORECASE)
    return _NUMBER.findall(text)
