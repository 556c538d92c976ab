"""The decoder for model families that the fast one does not know: transformers' forward pass, cache and processors.

Slots are written one after the other, each with a cache of its own: slow, and any causal model will do.

Shapes: T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parley.config import GenerationSection
from parley.errors import DeviceError
from parley.inference.decoder import FastDecoder
from parley.inference.interface import Decoder, DecodeRequest, Token
from parley.inference.prompts import context_length
from parley.models.adapters import require_base
from parley.models.device import describe_device
from parley.train_step.bind import Unsupported

logger = logging.getLogger(__name__)


class TransformersDecoder:
    """A Decoder (parley.inference.interface) of `slots` slots with room for `length` tokens each, one token a burst.

    `model` is in evaluation mode. Greedy answers are those of transformers' `generate`; draws go through its processors
    in its order (repetition penalty, temperature, top_k, top_p, min_p) with a generator for each answer.
    Raises ModelError where the base of a model without an adapter is asked for.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, slots: int, length: int) -> None:
        assert not model.training, "a decoder needs the model in evaluation mode"
        self._model, self._slots, self._length = model, slots, length
        self._answers: dict[int, _Answer] = {}
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        last_only = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def length(self) -> int:
        return self._length

    @property
    def vocab_size(self) -> int:
        return self._model.get_input_embeddings().num_embeddings

    def admit(self, asked: Mapping[int, DecodeRequest]) -> None:
        for slot, each in asked.items():
            assert slot not in self._answers, f"slot {slot} is taken"
            self._answers[slot] = _Answer.to(each, self._model.device, self._length)

    def decode(self) -> Mapping[int, list[Token]]:
        return {slot: [self._next(answer)] for slot, answer in self._answers.items() if not answer.over}

    def release(self, slot: int) -> None:
        self._answers.pop(slot, None)

    def reset(self) -> None:
        self._answers.clear()

    @torch.inference_mode()
    def _next(self, answer: _Answer) -> Token:
        unread_1T = answer.ids_1T[:, answer.read :]
        with self._voice(answer.asked.base):
            output = self._model(input_ids=unread_1T, past_key_values=answer.cache, **self._options)
        answer.cache, answer.read = output.past_key_values, answer.ids_1T.shape[1]
        return answer.draw(output.logits[:, -1].float())

    def _voice(self, base: bool) -> AbstractContextManager[Any]:
        if not base:
            return nullcontext()
        require_base(self._model)
        return self._model.disable_adapter()


@dataclass
class _Answer:
    """One slot's answer: its ids with the prompt's, the cache of those that were read, and how it draws."""

    asked: DecodeRequest
    ids_1T: torch.Tensor
    end: int  # tokens, with the prompt, at which it is over
    processors: LogitsProcessorList
    generator: torch.Generator
    cache: Any = None
    read: int = 0
    over: bool = False

    @classmethod
    def to(cls, asked: DecodeRequest, device: torch.device, length: int) -> _Answer:
        return cls(
            asked,
            torch.tensor([list(asked.prompt_ids)], device=device),
            min(length, len(asked.prompt_ids) + asked.settings.max_new_tokens),
            processors_of(asked.settings),
            torch.Generator(device).manual_seed(asked.seed),
        )

    def draw(self, logits_1V: torch.Tensor) -> Token:
        scores_1V = self.processors(self.ids_1T, logits_1V.clone())
        if self.asked.settings.temperature > 0:
            drawn_11 = torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator)
        else:
            drawn_11 = scores_1V.argmax(-1, keepdim=True)
        self.ids_1T = torch.cat([self.ids_1T, drawn_11], dim=1)
        token = int(drawn_11)
        self.over = token in self.asked.stop_ids or self.ids_1T.shape[1] >= self.end
        return _reported(token, logits_1V[0], self.asked.logprobs)


def processors_of(settings: GenerationSection) -> LogitsProcessorList:
    """transformers' processors for `settings`, in the order its `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature == 0:
        return processors
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k > 0:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p > 0:
        processors.append(MinPLogitsWarper(settings.min_p))
    return processors


def _reported(token: int, logits_V: torch.Tensor, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(token)
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(logprobs, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def decoder_for(model: PreTrainedModel | PeftModel, *, slots: int, length: int) -> Decoder:
    """The fast decoder where it knows the model, warmed up, else this one.

    `length` is cut to the model's positions. Raises DeviceError where so many slots do not fit into memory.
    """
    length = min(length, context_length(model) or length)
    try:
        decoder = FastDecoder.of(model, slots=slots, length=length)
        decoder.warm_up()
    except Unsupported as reason:
        logger.info("answers go through transformers, which is slower: %s", reason)
        return TransformersDecoder(model, slots=slots, length=length)
    except torch.OutOfMemoryError:
        room = f"{slots} answers of {length} tokens do not fit into {describe_device(model.device)} beside the model"
        raise DeviceError(f"{room}; lower --slots or --length") from None
    return decoder
