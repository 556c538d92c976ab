"""What the decoder asks of a backend, and the outputs of decode steps that the host has not read yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from parley.inference.interface import DecodeRequest, Token
from parley.inference.sampling import SamplingFeatures
from parley.inference.slot_state import NUM_SAMPLED, RUNNING, RunningRequest, SlotState

MAX_STEPS = 8  # per launch, and so the output columns of a row


@dataclass(frozen=True)
class StepOutputs:
    """The parts of a SlotState that the host reads. `copied`: recorded after their copy to the host; None without."""

    fields_BX: Tensor
    token_BU: Tensor
    logprob_BU: Tensor
    top_BUA: Tensor
    top_logprob_BUA: Tensor
    copied: torch.cuda.Event | None = None

    @classmethod
    def of(cls, state: SlotState) -> StepOutputs:
        return cls(state.fields_BX, state.token_BU, state.logprob_BU, state.top_BUA, state.top_logprob_BUA)

    @classmethod
    def pinned_like(cls, state: SlotState) -> StepOutputs:
        """Pinned host buffers for the outputs of `state`."""
        outputs = cls.of(state)
        tensors = (outputs.fields_BX, outputs.token_BU, outputs.logprob_BU, outputs.top_BUA, outputs.top_logprob_BUA)
        pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        return replace(cls(*pinned), copied=torch.cuda.Event())

    def copy_from(self, state: SlotState, features: SamplingFeatures) -> None:
        """Start the copy of `state`, of as many rows or fewer, into these pinned buffers."""
        assert self.copied is not None
        # Log-probabilities are most of the bytes and rarely asked for.
        names = ["fields_BX", "token_BU"]
        if features.logprobs:
            names += ["logprob_BU", "top_BUA", "top_logprob_BUA"]
        for name in names:
            source = vars(state)[name]
            vars(self)[name][: len(source)].copy_(source, non_blocking=True)
        self.copied.record()


class InFlightSteps:
    """Launched steps of `running`, which were the state's first rows in this order, and their outputs."""

    def __init__(self, running: list[RunningRequest], outputs: StepOutputs) -> None:
        self.running, self.outputs = running, outputs

    def read(self) -> Mapping[int, list[Token]]:
        """Wait for the outputs: the new tokens of each slot that was not released since. Marks finished answers."""
        if self.outputs.copied is not None:
            self.outputs.copied.synchronize()
        count = len(self.running)
        fields, token_BU = self.outputs.fields_BX.numpy()[:count], self.outputs.token_BU.numpy()[:count].tolist()
        num_sampled_B, running_B = fields[:, NUM_SAMPLED].tolist(), fields[:, RUNNING].tolist()
        emitted: dict[int, list[Token]] = {}
        for row, (request, num_sampled, running) in enumerate(zip(self.running, num_sampled_B, running_B, strict=True)):
            if request.finished:  # released, or ended in an earlier launch: its slot may belong to another by now
                continue
            # Tokens since the last read, each in the column of its number in the answer.
            columns = [index % len(token_BU[row]) for index in range(request.num_read, num_sampled)]
            if columns:
                emitted[request.slot] = [self._token(token_BU[row][column], row, column) for column in columns]
            request.num_read, request.finished = num_sampled, not running
        return emitted

    def _token(self, token: int, row: int, column: int) -> Token:
        count = self.running[row].request.logprobs
        if count is None:
            return Token(token)
        top = self.outputs.top_BUA[row, column, :count].tolist()
        logprobs = self.outputs.top_logprob_BUA[row, column, :count].tolist()
        return Token(token, self.outputs.logprob_BU[row, column].item(), tuple(zip(top, logprobs, strict=True)))


class StepRunner(Protocol):
    """A backend: prefill and decode steps over the rows of one state and one KV cache."""

    @property
    def max_steps(self) -> int:
        """The most steps of one launch."""

    @property
    def launches_ahead(self) -> int:
        """How many launches to have in flight while the outputs of one are read."""

    def warm_up(self) -> None:
        """Compile and capture what common steps need. No row is running."""

    def prefill(self, requests: Sequence[DecodeRequest], start: int) -> int:
        """Compute the keys and values of the prompts in the rows from `start` on, which the state already has.

        Returns how many tokens of each answer were sampled by it: 1 where it ends with the prompt's last token, 0
        where that is left to the first step.
        """

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        """Start up to `steps` steps of `running`, which are the state's first rows in order."""

    def emitted(self, row: int, ids: Sequence[int]) -> None:
        """Take note of an answer's new tokens."""

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy a row of the KV cache, of which `positions` are filled."""

    def reset(self) -> None:
        """Forget what the KV cache holds."""
