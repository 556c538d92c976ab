"""The PyTorch backend: steps one by one, sampled on the host."""

from __future__ import annotations

from collections.abc import Sequence

from parley.inference.cpu.prefill import Prefill
from parley.inference.cpu.prefix_cache import PrefixCache
from parley.inference.cpu.step import decode_step
from parley.inference.interface import DecodeRequest
from parley.inference.kv_cache import KVCache
from parley.inference.model import DecoderModel
from parley.inference.rotary import QkvRotary
from parley.inference.sampling import SamplingFeatures, sample_and_advance
from parley.inference.slot_state import RunningRequest, SlotState
from parley.inference.step_runner import InFlightSteps, StepOutputs


class EagerRunner:
    """Implements `step_runner.StepRunner`. `state` is on the host; the model and the cache may be on a GPU."""

    max_steps = 1
    launches_ahead = 0

    def __init__(self, model: DecoderModel, cache: KVCache, state: SlotState) -> None:
        self.model, self.cache, self.state = model, cache, state
        self.rotary = QkvRotary(model.rope, model.weights.layers)
        self.prefixes = PrefixCache(cache.rows)
        self._prefill = Prefill(model, cache, self.rotary, self.prefixes)

    def warm_up(self) -> None:
        """Nothing is compiled or captured."""

    def prefill(self, requests: Sequence[DecodeRequest], start: int) -> int:
        # The pass ends with the prompt's last token, so the first token is sampled here and needs no step.
        logits_JV = self._prefill(requests, start).cpu()
        state = self.state.rows(start, start + len(requests))
        sample_and_advance(logits_JV, state, SamplingFeatures.of(requests))
        return 1

    def launch(self, running: list[RunningRequest], steps: int) -> InFlightSteps:
        state = self.state.rows(0, len(running))
        features = SamplingFeatures.of(entry.request for entry in running)
        for _ in range(steps):
            logits_BV = decode_step(self.model, self.cache, self.rotary, state).cpu()
            sample_and_advance(logits_BV, state, features)
        # The outputs are views of the state: they are read before the next launch, as launches_ahead is 0.
        return InFlightSteps(running, StepOutputs.of(state))

    def emitted(self, row: int, ids: Sequence[int]) -> None:
        # Answers are prefixes, too: a chat's next prompt repeats them.
        self.prefixes.append(row, ids)

    def move(self, source: int, target: int, positions: int) -> None:
        self.cache.move(source, target, positions)
        self.prefixes.move(source, target)

    def reset(self) -> None:
        self.prefixes.clear()
