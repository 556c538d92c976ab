"""The decoder: answers in slots, drawn side by side from a static cache.

A slot is the number that the caller knows. Inside, the answers being written fill rows 0, 1, 2, ... without a hole, so
that a step's cost follows how many there are: when one ends, the last row moves into its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from parley.errors import DataError
from parley.inference.cpu.batch1 import CpuStep
from parley.inference.cpu.prefill import Reader
from parley.inference.interface import DecodeRequest, Token
from parley.inference.kv_cache import Cache
from parley.inference.linear import make_products
from parley.inference.model import Model, PlainStep, Voices, prefill
from parley.inference.sampling import Needs
from parley.inference.slot_state import LIVE, Row, State, room
from parley.inference.step_runner import MOST_TOKENS, Burst, Eager, Runner, take
from parley.train_step.bind import read_weights
from parley.train_step.fused_step import ops_for
from parley.train_step.packed_batch import StagingBuffer


class FastDecoder:
    """Implements `slots.Decoder` for the families that `engine.bind` knows.

    Dropping the decoder frees all that it took. It is for one thread at a time.
    """

    def __init__(
        self, model: Model, runner: Runner, cache: Cache, state: State, length: int, reader: Reader | None = None
    ) -> None:
        self.model, self.runner, self.cache, self.state = model, runner, cache, state
        self._length = length
        self.reader = reader  # gives first tokens with their prompts; without it they come from a step, as all others
        self.staging = StagingBuffer(model.weights.device, 256)
        self.rows: list[Row] = []
        self.bursts: list[Burst] = []
        self.fresh = False  # an answer waits for its first token

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: PreTrainedModel | PeftModel, *, slots: int, length: int, copies: bool = True, eager: bool = False
    ) -> FastDecoder:
        """A decoder for `model`, bare or with a LoRA adapter, as its adapter's weights are now.

        Args:
            slots: answers at a time.
            length: tokens that each has room for, prompt included; at most the model's positions.
            copies: keep weights that are used together side by side, and 4-bit ones unpacked, where half of the free
                memory holds them.
            eager: plain PyTorch on a GPU too, which graphs are held against.

        Raises engine.bind.Unsupported, with the reason in a few words, for models that it does not know.
        """
        weights = read_weights(model)
        length = min(length, model.config.max_position_embeddings)
        device = weights.device
        ops = ops_for(device)
        products, head = make_products(weights, ops, copies=copies)
        answering = Model(weights, products, head, weights.rope_table(length), ops)
        cache = Cache([layer.shape for layer in weights.layers], slots, length, weights.dtype, device)
        eager = eager or device.type != "cuda"
        state = State.empty(slots, weights.head_VD.shape[0], MOST_TOKENS, torch.device("cpu") if eager else device)
        if eager:
            voices = Voices.of(answering)
            on_cpu = device.type == "cpu"
            step, reader = (CpuStep if on_cpu else PlainStep)(voices, cache), Reader(voices, cache) if on_cpu else None
            return cls(answering, Eager(step, state), cache, state, length, reader)
        from parley.inference.cuda.graphs import Graphed  # Triton is there only where a GPU is

        return cls(answering, Graphed(answering, cache, state), cache, state, length)

    @property
    def slots(self) -> int:
        return len(self.state.fields_BF)

    @property
    def length(self) -> int:
        return self._length

    @property
    def vocab_size(self) -> int:
        return self.model.weights.embedding_VD.shape[0]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture what the first answers would otherwise wait for. No slot is drawing."""
        assert not self.rows
        if self.reader is None:
            prompts = [[0] * min(64, self._length)]
            self.runner.warm_up(partial(prefill, self.model, self.cache, self.staging, prompts, [0], [True]))

    @torch.inference_mode()
    def admit(self, asked: Mapping[int, DecodeRequest]) -> None:
        """Read the prompts into free slots, in one pass. They draw from the next `decode` on.

        Raises DataError for a prompt that leaves no room for an answer, UsageError for more `ends` than a row holds;
        nothing is admitted then.
        """
        taken = {row.slot for row in self.rows}
        assert not taken & asked.keys(), "slots are admitted when free"
        assert asked.keys() <= set(range(self.slots))
        for one in asked.values():
            if not 0 < len(one.prompt_ids) < self._length:
                raise DataError(
                    f"the prompt is {len(one.prompt_ids)} tokens and an answer's slot holds {self._length}, the answer "
                    "included; shorten it or start a new one"
                )
        first, every = len(self.rows), list(asked.values())
        self.state.admit(first, every, self._length)
        prompts, rows = [one.prompt_ids for one in every], range(first, first + len(every))
        tuned = [not one.base for one in every]
        if self.reader is None:
            prefill(self.model, self.cache, self.staging, prompts, rows, tuned)
        else:
            logits_BV = self.reader(prompts, rows, tuned)
            take(logits_BV, self.state.part(first, first + len(every)), Needs.of(every))
        sent = 0 if self.reader is None else 1
        self.rows += [Row(slot, one, room(one, self._length), sent=sent) for slot, one in asked.items()]
        self.fresh = True

    @torch.inference_mode()
    def decode(self) -> Mapping[int, list[Token]]:
        """The next tokens of each slot that is drawing, one or a few of them; empty when none is."""
        drawn: dict[int, list[Token]] = {}
        while any(row.slot not in drawn for row in self.rows):  # a fresh answer is not in bursts already under way
            while len(self.bursts) <= self.runner.ahead and (
                self.fresh or any(row.sent < row.limit for row in self.rows)
            ):
                self._launch()
            burst = self.bursts.pop(0)
            told = burst.read()
            for slot, tokens in told.items():
                drawn.setdefault(slot, []).extend(tokens)
            if self.reader is not None:
                for place, row in enumerate(self.rows):
                    if row.slot in told:
                        self.reader.kept.draw(place, [token.id for token in told[row.slot]])
            for row in burst.rows:
                if row.over and row in self.rows:
                    self._remove(row)
        if not self.rows:
            self.bursts.clear()
        return drawn

    def _launch(self) -> None:
        tokens = self.runner.tokens
        if self.fresh:  # a first token is not kept waiting, here or where it was drawn with its prompt
            tokens = 1 if self.reader is None else 0
        self.fresh = False
        self.bursts.append(self.runner.launch(list(self.rows), Needs.of(row.asked for row in self.rows), tokens))
        for row in self.rows:
            row.sent += tokens

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Free the slot, whether its answer is over or not. Tokens of it that are under way are never told."""
        for row in self.rows:
            if row.slot == slot:
                row.over = True
                self._remove(row)
                return

    @torch.inference_mode()
    def reset(self) -> None:
        """Free every slot and forget cached prompts, after `admit` or `decode` has raised."""
        self.rows.clear()
        self.bursts.clear()
        self.fresh = False
        self.state.whole(LIVE).zero_()
        if self.reader is not None:
            self.reader.kept.clear()

    def _remove(self, row: Row) -> None:
        """Give the row's place to the last one."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            source = len(self.rows)
            self.state.move(source, place)
            self.cache.move(source, place, min(len(last.asked.prompt_ids) + last.sent, self._length))
            if self.reader is not None:
                self.reader.kept.move(source, place)
            self.rows[place] = last
        self.state.whole(LIVE)[len(self.rows)] = 0
