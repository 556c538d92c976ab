"""The state of each running answer on the device: one row of numbers; thus admitting or moving an answer is one copy.

Shape suffixes besides docs/design.md's: X fields of a row, U output columns (tokens between two reads by the host),
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

# Fields of a row: int32 values, then float32 values stored in the same 32 bits, then the tokens that end the answer.
TOKEN, POSITION, NUM_SAMPLED, MAX_TOKENS, RUNNING, TOP_K, SEED = range(7)
TEMPERATURE, TAIL_P, MIN_P, PENALTY, ADAPTER = range(7, 12)
STOP_IDS = 12
MAX_STOP_IDS = 16
NUM_FIELDS = STOP_IDS + MAX_STOP_IDS
ALTERNATIVES = 20  # the most that OpenAI's API allows for top_logprobs
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SlotState:
    """The rows of running answers, and the buffers their sampled tokens are written to.

    TOKEN is what the next step reads, at POSITION. NUM_SAMPLED counts the answer's tokens, at most MAX_TOKENS; RUNNING
    is 1 while more are to come. TAIL_P is 1 - top_p; ADAPTER is 1 with the adapter and 0 without. `seen_BV` marks the
    tokens of prompt and answer, for the repetition penalty. Token i of an answer is written to column i modulo U.
    """

    fields_BX: Tensor
    seen_BV: Tensor
    token_BU: Tensor
    logprob_BU: Tensor
    top_BUA: Tensor
    top_logprob_BUA: Tensor

    @classmethod
    def zeros(cls, rows: int, vocab_size: int, columns: int, device: torch.device) -> SlotState:
        alternatives = min(ALTERNATIVES, vocab_size)
        fields_BX = torch.zeros(rows, NUM_FIELDS, dtype=torch.int32, device=device)
        fields_BX.view(torch.float32)[:, PENALTY] = 1.0
        return cls(
            fields_BX,
            torch.zeros(rows, vocab_size, dtype=torch.bool, device=device),
            torch.zeros(rows, columns, dtype=torch.int32, device=device),
            torch.zeros(rows, columns, dtype=torch.float32, device=device),
            torch.zeros(rows, columns, alternatives, dtype=torch.int32, device=device),
            torch.zeros(rows, columns, alternatives, dtype=torch.float32, device=device),
        )

    def rows(self, start: int, end: int) -> SlotState:
        """A view of the rows from `start` up to `end`."""
        return SlotState(*(tensor[start:end] for tensor in vars(self).values()))

    def ints(self, field: int) -> Tensor:
        """(B,) int32 view of a field."""
        return self.fields_BX[:, field]

    def floats(self, field: int) -> Tensor:
        """(B,) float32 view of a field."""
        return self.fields_BX.view(torch.float32)[:, field]

    def admit(self, start: int, requests: list[DecodeRequest], length: int) -> None:
        """Write new requests into the rows from `start` on; `length` as in `max_tokens`."""
        rows = np.stack([encode(request, length) for request in requests])
        self.fields_BX[start : start + len(requests)] = torch.from_numpy(rows).to(self.fields_BX.device)
        self.seen_BV[start : start + len(requests)] = False
        for row, request in enumerate(requests, start):
            if request.settings.repetition_penalty != 1.0:  # nothing else reads them
                self.seen_BV[row, torch.tensor(list(request.prompt_ids), device=self.seen_BV.device)] = True

    def move(self, source: int, target: int) -> None:
        """Copy a row. Outputs stay behind: steps in flight write them where the row was when they were launched."""
        self.fields_BX[target] = self.fields_BX[source]
        self.seen_BV[target] = self.seen_BV[source]


def encode(request: DecodeRequest, length: int) -> NDArray[np.int32]:
    """The fields (X) of an answer without tokens: the first step reads the prompt's last token.

    Raises UsageError for more stop ids than a row holds.
    """
    if len(request.stop_ids) > MAX_STOP_IDS:
        raise UsageError(f"{len(request.stop_ids)} tokens that end an answer were given; give at most {MAX_STOP_IDS}")
    settings, prompt_length = request.settings, len(request.prompt_ids)
    row = np.full(NUM_FIELDS, -1, dtype=np.int32)
    row[TOKEN], row[POSITION], row[NUM_SAMPLED], row[RUNNING] = request.prompt_ids[-1], prompt_length - 1, 0, 1
    row[MAX_TOKENS], row[TOP_K] = max_tokens(request, length), settings.top_k
    # Both halves of the 64-bit seed count: seeds that differ only in the upper one give different answers.
    seed = hash32(hash32(request.seed & MASK32) ^ (request.seed >> 32 & MASK32))
    row[SEED : SEED + 1] = np.array([seed], np.uint32).view(np.int32)
    row.view(np.float32)[TEMPERATURE : ADAPTER + 1] = (
        settings.temperature,
        1 - settings.top_p,
        settings.min_p,
        settings.repetition_penalty,
        not request.base,
    )
    row[STOP_IDS : STOP_IDS + len(request.stop_ids)] = sorted(request.stop_ids)
    return row


def hash32(number: int) -> int:
    """A 32-bit integer hash: lowbias32 of C. Wellons, "Prospecting for hash functions"."""
    number ^= number >> 16
    number = number * 0x7FEB352D & MASK32
    number ^= number >> 15
    number = number * 0x846CA68B & MASK32
    return number ^ number >> 16


@dataclass(eq=False)
class RunningRequest:
    """What the host knows of a running answer.

    `num_launched`: tokens whose steps were launched on the device; `num_read`: those that the host has read.
    """

    slot: int
    request: DecodeRequest
    max_tokens: int
    num_read: int = 0
    num_launched: int = 0
    finished: bool = False


def max_tokens(request: DecodeRequest, length: int) -> int:
    """The most tokens of an answer in a slot that holds `length` tokens, prompt included."""
    return min(request.settings.max_new_tokens, length - len(request.prompt_ids))
