"""Reward functions that come with Parley, for `training.rewards: [parley.rewards:ends_with]`.

They are called as TRL calls rewards: with the completions, and with each column of the data under its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"[\w'-]+")

Completion = str | list[dict[str, Any]]


def ends_with(completions: Sequence[Completion], ending: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for an answer whose last word is that of the column `ending`, in any case; else 0."""
    last = [_WORD.findall(text_of(completion).casefold())[-1:] for completion in completions]
    return [float(words == [wanted.casefold()]) for words, wanted in zip(last, ending, strict=True)]


def equals(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 for an answer that is that of the column `answer`, but for case and surrounding space; else 0."""
    return [
        float(text_of(completion).strip().casefold() == str(wanted).strip().casefold())
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def last_number(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 for an answer whose last number is the last one of the column `answer` (GSM8K's is "#### 18"); else 0."""
    return [
        float((number := _last_number(text_of(completion))) is not None and number == _last_number(str(wanted)))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def text_of(completion: Completion) -> str:
    """The text of an answer, which is messages where the prompt is a conversation."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion if message.get("role") == "assistant")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
