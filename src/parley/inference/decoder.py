"""The decoder for the families that the fused step knows: answers in slots, over a static KV cache.

A slot is the number that the caller uses. Inside, running answers fill rows 0, 1, 2, ... of the state and the cache
without gaps, so that the cost of a step follows their number: when one ends, the last row moves into its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parley.errors import DataError, ModelError
from parley.inference.cpu.runner import EagerRunner
from parley.inference.interface import DecodeRequest, Token
from parley.inference.kv_cache import KVCache
from parley.inference.linear import make_linears
from parley.inference.model import DecoderModel
from parley.inference.slot_state import RUNNING, RunningRequest, SlotState, max_tokens
from parley.inference.step_runner import MAX_STEPS, InFlightSteps, StepRunner
from parley.models.base_answers import base_obstacle
from parley.train_step.bind import read_weights
from parley.train_step.device_ops import ops_for


class StaticCacheDecoder:
    """Implements `interface.Decoder` for the families that `train_step.bind` knows.

    Dropping the decoder frees all its memory. It is for one thread at a time.
    """

    def __init__(self, model: DecoderModel, runner: StepRunner, cache: KVCache, state: SlotState, length: int) -> None:
        self.model, self.runner, self.cache, self.state = model, runner, cache, state
        self._length = length
        self.base_obstacle: str | None = None  # why the base of the model cannot answer
        self.running: list[RunningRequest] = []  # by row
        self.in_flight: list[InFlightSteps] = []
        self.awaits_first = False  # an admitted answer has no token read yet

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        model: PreTrainedModel | PeftModel,
        *,
        slots: int,
        length: int,
        fuse: bool = True,
        eager: bool = False,
        fused_NK: Sequence[Tensor] | None = None,
    ) -> StaticCacheDecoder:
        """A decoder for `model`, bare or with a LoRA adapter, as its adapter's weights are now.

        Args:
            slots: answers at a time.
            length: tokens that each slot holds, prompt included; at most the model's positions.
            fuse: copy weights that are used together into one matrix, 4-bit ones dequantized, where half of the free
                memory holds them.
            eager: steps in plain PyTorch on a GPU, too: the reference for CUDA graphs.
            fused_NK: see make_linears.

        Raises train_step.bind.Unsupported, with the reason in a few words, for other models.
        """
        weights = read_weights(model)
        length = min(length, model.config.max_position_embeddings)
        if weights.rope_switch is not None:  # a longer text has other frequencies, for the tokens it starts with too
            length = min(length, weights.rope_switch)
        device = weights.device
        ops = ops_for(device)
        linears, head = make_linears(weights, ops, fuse=fuse, fused_NK=fused_NK)
        decoder_model = DecoderModel(weights, linears, head, weights.rope_tables(length), ops)
        cache = KVCache(decoder_model.shapes, slots, length, weights.dtype, device)
        eager = eager or device.type != "cuda"
        vocab_size = weights.head_VD.shape[0]
        state = SlotState.zeros(slots, vocab_size, MAX_STEPS, torch.device("cpu") if eager else device)
        runner: StepRunner
        if eager:
            runner = EagerRunner(decoder_model, cache, state)
        else:
            from parley.inference.cuda.graphs import GraphRunner  # Triton is installed only where a GPU is

            runner = GraphRunner(decoder_model, cache, state)
        decoder = cls(decoder_model, runner, cache, state, length)
        # Without an adapter the model is its own base.
        decoder.base_obstacle = base_obstacle(model) if isinstance(model, PeftModel) else None
        return decoder

    @property
    def slots(self) -> int:
        return len(self.state.fields_BX)

    @property
    def length(self) -> int:
        return self._length

    @property
    def vocab_size(self) -> int:
        return self.model.weights.embedding_VD.shape[0]

    @torch.inference_mode()
    def refresh_adapter(self, model: PeftModel) -> None:
        """Take the adapter's weights as they are now, and forget cached prompts. No slot is running."""
        assert not self.running
        for linears, layer in zip(self.model.linears, read_weights(model).layers, strict=True):
            for linear, source in zip(linears.all, (layer.qkv, layer.o, layer.gate_up, layer.down), strict=True):
                if source.adapter_slices:
                    linear.copy_adapters(source)
        self.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture what the first answers would otherwise wait for. No slot is running."""
        assert not self.running
        self.runner.warm_up()

    @torch.inference_mode()
    def admit(self, requests: Mapping[int, DecodeRequest]) -> None:
        """Prefill the prompts into free slots, in one pass. Their tokens come from the next `decode` on.

        Raises DataError for a prompt that leaves no room for an answer, UsageError for more stop ids than a row holds,
        ModelError for a base that the adapter has changed; nothing is admitted then.
        """
        taken = {running.slot for running in self.running}
        assert not taken & requests.keys(), "slots are admitted when free"
        assert requests.keys() <= set(range(self.slots))
        for request in requests.values():
            if request.base and self.base_obstacle is not None:
                raise ModelError(
                    f"the base model cannot answer: {self.base_obstacle}; to ask it, open it by its own name"
                )
            if not 0 < len(request.prompt_ids) < self._length:
                raise DataError(
                    f"the prompt is {len(request.prompt_ids)} tokens and an answer's slot holds {self._length}, the "
                    "answer included; shorten it or start a new one"
                )
        start = len(self.running)
        self.state.admit(start, list(requests.values()), self._length)
        sampled = self.runner.prefill(list(requests.values()), start)
        self.running += [
            RunningRequest(slot, request, max_tokens(request, self._length), num_launched=sampled)
            for slot, request in requests.items()
        ]
        self.awaits_first = True

    @torch.inference_mode()
    def decode(self) -> Mapping[int, list[Token]]:
        """The next tokens of each running slot, one or several of them; empty when none is running."""
        emitted: dict[int, list[Token]] = {}
        # Steps already in flight do not have an answer that was admitted since, so one read may not be enough.
        while any(running.slot not in emitted for running in self.running):
            while len(self.in_flight) <= self.runner.launches_ahead and self._has_steps():
                self._launch()
            steps = self.in_flight.pop(0)
            new = steps.read()
            for slot, tokens in new.items():
                emitted.setdefault(slot, []).extend(tokens)
            for row, running in enumerate(self.running):
                if running.slot in new:
                    self.runner.emitted(row, [token.id for token in new[running.slot]])
            for running in steps.running:
                if running.finished and running in self.running:
                    self._remove(running)
        if not self.running:
            self.in_flight.clear()
        return emitted

    def _has_steps(self) -> bool:
        return self.awaits_first or any(running.num_launched < running.max_tokens for running in self.running)

    def _launch(self) -> None:
        steps = self.runner.max_steps
        if self.awaits_first:  # a first token is not kept waiting for several steps; prefill may have sampled it
            steps = 1 if any(running.num_launched == 0 for running in self.running) else 0
        self.awaits_first = False
        self.in_flight.append(self.runner.launch(list(self.running), steps))
        for running in self.running:
            running.num_launched += steps

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free the slot, whether its answer is finished or not. Its tokens still in flight are never emitted."""
        for running in self.running:
            if running.slot == slot:
                running.finished = True
                self._remove(running)
                return

    @torch.inference_mode()
    def reset(self) -> None:
        """Free every slot and forget cached prompts, after `admit` or `decode` has raised."""
        self.running.clear()
        self.in_flight.clear()
        self.awaits_first = False
        self.state.ints(RUNNING).zero_()
        self.runner.reset()

    def _remove(self, running: RunningRequest) -> None:
        """Move the last row into the place of this one."""
        row, last = self.running.index(running), self.running.pop()
        if last is not running:
            source = len(self.running)
            positions = min(len(last.request.prompt_ids) + last.num_launched, self._length)
            self.state.move(source, row)
            self.runner.move(source, row, positions)
            self.running[row] = last
        # A graph runs more rows than there are answers: those beyond the last must not advance.
        self.state.ints(RUNNING)[len(self.running)] = 0
