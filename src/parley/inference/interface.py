"""The interface between the scheduler and the decoders: a fixed number of slots, each generating one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from parley.config import GenerationSection


@dataclass(frozen=True)
class DecodeRequest:
    """One answer to generate.

    Args:
        prompt_ids: token ids of the prompt, at least one.
        settings: sampling parameters and `max_new_tokens`.
        stop_ids: tokens that end the answer.
        seed: with the position in the answer, the only source of randomness: other slots have no influence.
        base: generate with the adapter disabled.
        logprobs: how many of the most likely tokens to report beside each sampled one; None for no log-probabilities.
    """

    prompt_ids: Sequence[int]
    settings: GenerationSection
    stop_ids: frozenset[int]
    seed: int
    base: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """One sampled token. Log-probabilities are the model's own, before temperature and the other settings."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Decoder(Protocol):
    """Generates up to `slots` answers side by side, each of at most `length` tokens with its prompt."""

    @property
    def slots(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """DeviceBatch of the model's embedding: prompt ids must lie below."""

    def admit(self, requests: Mapping[int, DecodeRequest]) -> None:
        """Prefill the prompts into free slots. Sampled tokens come from the next `decode` on.

        Raises a ParleyError, and admits none of them, where one cannot be decoded.
        """

    def decode(self) -> Mapping[int, list[Token]]:
        """The next tokens of each running slot, one or several of them; empty when none is running.

        A slot stops after one of its `stop_ids` (emitted as its last token), after `max_new_tokens`, or when it holds
        `length` tokens.
        """

    def release(self, slot: int) -> None:
        """Free the slot, whether its answer is finished or not."""

    def reset(self) -> None:
        """Free every slot and forget cached prompts, after `admit` or `decode` has raised."""
