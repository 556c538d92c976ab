"""The backend for any other causal model: transformers' forward pass, cache and logits processors.

Slots are decoded one after the other, each with a cache of its own: slow, but it needs no padding, so that recurrent
models and those with unusual positions are right, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from parley.inference.interface import DecodeRequest, Token
from parley.models.adapters import require_base

# The names of a forward pass's cache, in and out: `cache` since transformers 5.23, before that `cache_params` in Mamba
# and its relatives and `past_key_values` elsewhere; `state` is RWKV's.
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")


class TransformersDecoder:
    """Implements `interface.Decoder`, one token per call of `decode`.

    `model` is in evaluation mode. Greedy answers are those of transformers' `generate`; sampling goes through its
    processors in its order (repetition penalty, temperature, top_k, top_p, min_p), with a torch.Generator per answer.

    `reason`: why the model is decoded here, in a few words.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, slots: int, length: int, reason: str = "") -> None:
        assert not model.training, "a decoder needs the model in evaluation mode"
        self.reason = reason
        self._model, self._slots, self._length = model, slots, length
        self._answers: dict[int, _Answer] = {}
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        parameters = inspect.signature(inner.forward).parameters
        self._cache_name: Any = next((name for name in CACHE_NAMES if name in parameters), None)
        self._options: dict[str, Any] = {}
        if "use_cache" in parameters:
            self._options["use_cache"] = True
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def length(self) -> int:
        return self._length

    @property
    def vocab_size(self) -> int:
        return self._model.get_input_embeddings().weight.shape[0]

    def admit(self, requests: Mapping[int, DecodeRequest]) -> None:
        """Raises ModelError for the base of a model that has none, or whose adapter changed it."""
        if any(request.base for request in requests.values()):
            require_base(self._model)
        for slot, request in requests.items():
            assert slot not in self._answers, f"slot {slot} is taken"
            self._answers[slot] = _Answer.to(request, self._model.device, self._length)

    def decode(self) -> Mapping[int, list[Token]]:
        return {slot: [self._next(answer)] for slot, answer in self._answers.items() if not answer.finished}

    def release(self, slot: int) -> None:
        self._answers.pop(slot, None)

    def reset(self) -> None:
        self._answers.clear()

    @torch.inference_mode()
    def _next(self, answer: _Answer) -> Token:
        options = dict(self._options)
        if answer.cache is not None:
            options[self._cache_name] = answer.cache
        new_1T = answer.ids_1T[:, answer.num_cached :]
        if answer.request.base:
            with adapter_disabled(self._model):
                output = self._model(input_ids=new_1T, **options)
        else:
            output = self._model(input_ids=new_1T, **options)
        answer.cache = None if self._cache_name is None else output.get(self._cache_name)
        if answer.cache is not None:  # a model that returns none reads the whole text for each token
            answer.num_cached = answer.ids_1T.shape[1]
        return answer.sample(output.logits[:, -1].float())


@dataclass
class _Answer:
    """One slot: the ids of prompt and answer, the cache of those already read, and how to sample the next."""

    request: DecodeRequest
    ids_1T: torch.Tensor
    max_length: int  # tokens, prompt included
    processors: LogitsProcessorList
    generator: torch.Generator
    cache: Any = None
    num_cached: int = 0
    finished: bool = False

    @classmethod
    def to(cls, request: DecodeRequest, device: torch.device, length: int) -> _Answer:
        return cls(
            request,
            torch.tensor([list(request.prompt_ids)], device=device),
            min(length, len(request.prompt_ids) + request.settings.max_new_tokens),
            logits_processors(request.settings),
            torch.Generator(device).manual_seed(request.seed),
        )

    def sample(self, logits_1V: torch.Tensor) -> Token:
        # A copy, since processors may write in place and logprobs are of the model's own logits.
        scores_1V = self.processors(self.ids_1T, logits_1V.clone())
        if self.request.settings.temperature > 0:
            token_11 = torch.multinomial(scores_1V.softmax(-1), 1, generator=self.generator)
        else:
            token_11 = scores_1V.argmax(-1, keepdim=True)
        self.ids_1T = torch.cat([self.ids_1T, token_11], dim=1)
        token = int(token_11)
        self.finished = token in self.request.stop_ids or self.ids_1T.shape[1] >= self.max_length
        return _with_logprobs(token, logits_1V[0], self.request.logprobs)


def logits_processors(settings: GenerationSection) -> LogitsProcessorList:
    """transformers' processors for `settings`, in the order its `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    # The warpers below never change which logit is the largest.
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


def _with_logprobs(token: int, logits_V: torch.Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(min(count, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """The base model, without its adapter. PEFT's own context manager marks adapters trainable on leaving; here every
    parameter keeps its `requires_grad`."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def inference_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing), restored module by module on leaving."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
