"""Rollouts for reinforcement learning: answers in token ids, sampled from a model between two of its training steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.errors import DeviceError
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.hf import TransformersDecoder, inference_mode_of
from parley.inference.interface import Decoder, DecodeRequest
from parley.inference.output_processor import OutputProcessor
from parley.models.device import describe_device
from parley.train_step.bind import Unsupported
from parley.units import round_up

logger = logging.getLogger(__name__)

LENGTH_MULTIPLE = 64
"""Tokens that a slot's length is rounded up to, so that slightly longer prompts need no new decoder."""


class RolloutDecoder:
    """Samples answers from `model` with its weights as they are at each call.

    Its base weights are read where they are. Between two calls the decoder and its KV cache stay allocated, and only
    the adapter is copied anew. A model whose base weights are trained gets a new decoder at each call.

    Args:
        slots: the most answers that are generated at a time; halved where memory does not hold so many.

    `plain_because` says why answers go through transformers; None while they do not.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, slots: int, plain: bool = False
    ) -> None:
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.plain_because: str | None = "engine: plain" if plain else None
        self.tokens = 0  # sampled so far
        self._decoder: StaticCacheDecoder | None = None

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSection,
        seeds: Sequence[int],
        stop_ids: Iterable[int],
        fused_NK: Sequence[Tensor] | None = None,
    ) -> list[list[int]]:
        """The token ids of one answer to each prompt, with the token that ended it.

        An answer of `settings.max_new_tokens` may lack an end, as one whose slot is full.

        Args:
            seeds: of each answer; with its prompt and the weights they determine it.
            fused_NK: see linear.make_linears.

        Raises DataError for a prompt that leaves no room for an answer, DeviceError where no slot fits into memory.
        """
        stops = frozenset(stop_ids)
        requests = [
            DecodeRequest(prompt, settings, stops, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        length = round_up(max(map(len, prompts)) + settings.max_new_tokens, LENGTH_MULTIPLE)
        decoder = self._static_cache_decoder(length, len(requests), fused_NK)
        if decoder is not None:
            answers = self._decode(decoder, requests)
        else:
            with inference_mode_of(self.model):
                slots = min(self.slots, len(requests))
                answers = self._decode(TransformersDecoder(self.model, slots=slots, length=length), requests)
        self.tokens += sum(map(len, answers))
        return answers

    def close(self) -> None:
        """Free the decoder. The next call makes another."""
        self._decoder = None

    def _decode(self, decoder: Decoder, requests: Sequence[DecodeRequest]) -> list[list[int]]:
        """One token list a request; a slot takes the next request as soon as it is free."""
        answers: list[list[int]] = [[] for _ in requests]
        waiting = deque(enumerate(requests))
        running: dict[int, tuple[int, OutputProcessor]] = {}
        with ExitStack() as undo:
            undo.callback(self.close)  # after an error or Ctrl-C, its slots are taken
            while waiting or running:
                admitted: dict[int, DecodeRequest] = {}
                for slot in range(decoder.slots):
                    if slot not in running and waiting:
                        index, request = waiting.popleft()
                        admitted[slot] = request
                        running[slot] = index, self._output(request, decoder.length)
                if admitted:
                    decoder.admit(admitted)
                for slot, tokens in decoder.decode().items():
                    index, output = running[slot]
                    if self._append(answers[index], [token.id for token in tokens], output):
                        decoder.release(slot)
                        del running[slot]
            undo.pop_all()
        return answers

    def _output(self, request: DecodeRequest, length: int) -> OutputProcessor:
        longest = min(request.settings.max_new_tokens, length - len(request.prompt_ids))
        return OutputProcessor(self.tokenizer, request.stop_ids, request.settings.stop, longest)

    def _append(self, answer: list[int], ids: Sequence[int], output: OutputProcessor) -> bool:
        """Add the tokens up to the one that ends the answer. Returns whether there was one."""
        for token in ids:
            answer.append(token)
            if output.ends_with(token):
                return True
        return False

    def _static_cache_decoder(
        self, length: int, requests: int, fused_NK: Sequence[Tensor] | None
    ) -> StaticCacheDecoder | None:
        """The kept decoder, up to date; None where the model has none of Parley's own."""
        if self.plain_because is not None:
            return None
        slots = min(self.slots, requests)
        kept = self._decoder
        if kept is not None and kept.slots >= slots and kept.length >= length and self._has_frozen_base:
            assert isinstance(self.model, PeftModel)
            kept.refresh_adapter(self.model)
            return kept
        self.close()  # first: two would not fit into memory where one does
        try:
            self._decoder = self._make(slots, length, fused_NK)
        except Unsupported as reason:
            self.plain_because = str(reason)
            logger.warning("answers are sampled through transformers, which is slower: %s", reason)
        return self._decoder

    def _make(self, slots: int, length: int, fused_NK: Sequence[Tensor] | None) -> StaticCacheDecoder:
        # A CPU decodes twice as fast from packed copies of a small base; on a GPU memory is for training.
        fuse = self._has_frozen_base and self.model.device.type == "cpu"
        while True:
            try:
                decoder = StaticCacheDecoder.of(
                    self.model, slots=slots, length=length, fuse=fuse, fused_NK=None if fuse else fused_NK
                )
                decoder.warm_up()
                return decoder
            except torch.OutOfMemoryError:
                if slots == 1:
                    raise DeviceError(
                        f"an answer of {length} tokens does not fit into {describe_device(self.model.device)} beside "
                        "training; lower training.max_completion_length, or set training.memory: low"
                    ) from None
            slots = self.slots = slots // 2
            logger.warning("%d answers are sampled at a time: more do not fit into memory beside training", slots)

    @property
    def _has_frozen_base(self) -> bool:
        """Whether only a LoRA adapter is trained, so that a decoder's base weights stay right."""
        if not isinstance(self.model, PeftModel):
            return False
        return all(".lora_" in name for name, p in self.model.named_parameters() if p.requires_grad)
