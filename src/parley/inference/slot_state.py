"""What the device knows of each answer being written: one row of numbers, so that admitting or moving an answer is one
copy.

Shape suffixes: B rows, F fields of a row, V vocabulary, N tokens between host looks,
A alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parley.errors import UsageError
from parley.inference.interface import DecodeRequest

# Fields of a row: whole numbers, then floats stored in the same 32 bits, then the tokens that end the answer.
TOKEN, POSITION, DRAWN, LIMIT, LIVE, TOP_K, SEED = range(7)
TEMPERATURE, TAIL, MIN_P, PENALTY, TUNED = range(7, 12)
ENDS = 12
MOST_ENDS = 16
FIELDS = ENDS + MOST_ENDS
ALTERNATIVES = 20  # the most that OpenAI's interface lets one ask for
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class State:
    """Rows of running answers, and where their tokens are reported.

    `token`: the one that the next step reads, at `position`. `drawn`: tokens of the answer so far, of at most `limit`;
    `live`: whether more are to come. `seen_BV`: tokens of prompt and answer, for the repetition penalty. The i-th token
    of an answer is reported in column i modulo N.
    """

    fields_BF: Tensor
    seen_BV: Tensor
    token_BN: Tensor
    logprob_BN: Tensor
    top_BNA: Tensor
    top_logprob_BNA: Tensor

    @classmethod
    def empty(cls, rows: int, vocabulary: int, tokens: int, device: torch.device) -> State:
        alternatives = min(ALTERNATIVES, vocabulary)
        fields_BF = torch.zeros(rows, FIELDS, dtype=torch.int32, device=device)
        fields_BF.view(torch.float32)[:, PENALTY] = 1.0
        return cls(
            fields_BF,
            torch.zeros(rows, vocabulary, dtype=torch.bool, device=device),
            torch.zeros(rows, tokens, dtype=torch.int32, device=device),
            torch.zeros(rows, tokens, dtype=torch.float32, device=device),
            torch.zeros(rows, tokens, alternatives, dtype=torch.int32, device=device),
            torch.zeros(rows, tokens, alternatives, dtype=torch.float32, device=device),
        )

    def first(self, rows: int) -> State:
        """A view of the first rows."""
        return self.part(0, rows)

    def part(self, start: int, end: int) -> State:
        """A view of the rows from `start` up to `end`."""
        return State(*(tensor[start:end] for tensor in vars(self).values()))

    def whole(self, column: int) -> Tensor:
        return self.fields_BF[:, column]

    def real(self, column: int) -> Tensor:
        return self.fields_BF.view(torch.float32)[:, column]

    def admit(self, first: int, asked: list[DecodeRequest], length: int) -> None:
        """Write fresh answers into the rows from `first` on, each with room for `length` tokens, prompt included."""
        rows = np.stack([encode(one, length) for one in asked])
        device = self.fields_BF.device
        self.fields_BF[first : first + len(asked)] = torch.from_numpy(rows).to(device)
        for row, one in enumerate(asked, first):
            self.seen_BV[row] = False
            if one.settings.repetition_penalty != 1.0:
                self.seen_BV[row, torch.tensor(list(one.prompt_ids), device=device)] = True

    def move(self, source: int, target: int) -> None:
        self.fields_BF[target] = self.fields_BF[source]
        self.seen_BV[target] = self.seen_BV[source]


def encode(asked: DecodeRequest, length: int) -> NDArray[np.int32]:
    """A row's fields before its first draw: the prompt's last token is the one that the first step reads."""
    if len(asked.stop_ids) > MOST_ENDS:
        raise UsageError(f"{len(asked.stop_ids)} tokens that end an answer were given; give at most {MOST_ENDS}")
    settings, prompt = asked.settings, len(asked.prompt_ids)
    row = np.full(FIELDS, -1, dtype=np.int32)
    row[TOKEN], row[POSITION], row[DRAWN], row[LIVE] = asked.prompt_ids[-1], prompt - 1, 0, 1
    row[LIMIT], row[TOP_K] = room(asked, length), settings.top_k
    row[SEED : SEED + 1] = np.array([mix(mix(asked.seed & MASK) ^ (asked.seed >> 32 & MASK))], np.uint32).view(np.int32)
    row.view(np.float32)[TEMPERATURE : TUNED + 1] = (
        settings.temperature,
        1 - settings.top_p,
        settings.min_p,
        settings.repetition_penalty,
        not asked.base,
    )
    row[ENDS : ENDS + len(asked.stop_ids)] = sorted(asked.stop_ids)
    return row


def mix(number: int) -> int:
    """32 bits well stirred: C. Wellons, "Prospecting for hash functions" (lowbias32)."""
    number ^= number >> 16
    number = number * 0x7FEB352D & MASK
    number ^= number >> 15
    number = number * 0x846CA68B & MASK
    return number ^ number >> 16


@dataclass(eq=False)
class Row:
    """What the host knows of a running answer. `sent`: tokens asked of the device, `drawn`: those it has told."""

    slot: int
    asked: DecodeRequest
    limit: int
    drawn: int = 0
    sent: int = 0
    over: bool = False

    @property
    def position(self) -> int:
        """Where the token that the next step reads stands, as far as the host has looked."""
        return len(self.asked.prompt_ids) - 1 + self.drawn


def room(asked: DecodeRequest, length: int) -> int:
    """The most tokens that an answer may have in a slot of `length`, its prompt included."""
    return min(asked.settings.max_new_tokens, length - len(asked.prompt_ids))
