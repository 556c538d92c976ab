"""What a scheduler asks of a decoder: slots that each write one answer, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from parley.config import GenerationSection


@dataclass(frozen=True)
class Asked:
    """What a slot is to answer. `ends`: tokens that end the answer; `base`: with the adapter switched off.

    `seed` decides every draw together with the place in the answer, whatever the other slots do.
    `logprobs`: how many of the likeliest tokens to report beside each drawn one; None for no log-probabilities at all.
    """

    prompt_ids: Sequence[int]
    settings: GenerationSection
    ends: frozenset[int]
    seed: int
    base: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One drawn token. Log-probabilities are the model's own, before temperature and the other settings."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Decoder(Protocol):
    """`slots` answers at a time, each with room for `length` tokens, its prompt included."""

    @property
    def slots(self) -> int: ...

    @property
    def length(self) -> int: ...

    def admit(self, asked: Mapping[int, Asked]) -> None:
        """Read the prompts into free slots, in one pass. They draw from the next `decode` on."""

    def decode(self) -> Mapping[int, list[Token]]:
        """The next tokens of each slot that is drawing, one or a few of them.

        A slot stops drawing after one of its `ends` (given as its last token), after `max_new_tokens`, or when its
        room is full.
        """

    def release(self, slot: int) -> None:
        """Free the slot, whether its answer is over or not."""
