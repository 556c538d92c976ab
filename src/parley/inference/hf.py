"""The backend for any other causal model: transformers' forward pass, cache and logits processors.

Each prompt is prefilled by itself. Running answers are decoded in one left-padded batch where the model is shown to
isolate documents and caches keys and values of attention alone; recurrent models and those with unusual positions are
decoded one answer at a time, without padding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from parley.config import GenerationSection
from parley.inference.interface import DecodeRequest, Token
from parley.models.base_answers import require_base
from parley.models.packing_isolation import why_not_packed
from parley.train_step.bind import longrope_switch

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
        # Of answers with the adapter disabled (True) and enabled; one forward pass has one of the two.
        self._batches = {base: _Batch() for base in (False, True)}
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        parameters = inspect.signature(inner.forward).parameters
        self._cache_name: Any = next((name for name in CACHE_NAMES if name in parameters), None)
        self._longrope_switch = longrope_switch(inner.config)
        self._options: dict[str, Any] = {}
        if "use_cache" in parameters:
            self._options["use_cache"] = True
        if "logits_to_keep" in parameters:
            self._options["logits_to_keep"] = 1
        # TRL sets it in a mixture's config: the auxiliary loss would be computed at each step, from a mask of the whole
        # text beside the routing of one token.
        if "output_router_logits" in parameters:
            self._options["output_router_logits"] = False

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

    @torch.inference_mode()
    def decode(self) -> Mapping[int, list[Token]]:
        running = {slot: answer for slot, answer in self._answers.items() if not answer.finished}
        logits_1V: dict[int, torch.Tensor] = {}
        for base, batch in self._batches.items():
            group = {slot: a for slot, a in running.items() if a.request.base is base and a.num_cached}
            if len(group) < 2 or not self._can_batch:
                group = {}
            batch.set_answers(list(group.values()))
            if group:
                logits_1V |= zip(group, self._forward_batch(batch, base).split(1), strict=True)
        for slot, answer in running.items():
            if slot not in logits_1V:
                logits_1V[slot] = self._forward(answer)
        return {slot: [answer.sample(logits_1V[slot])] for slot, answer in running.items()}

    def release(self, slot: int) -> None:
        self._answers.pop(slot, None)

    def reset(self) -> None:
        self._answers.clear()
        self._batches = {base: _Batch() for base in (False, True)}

    @cached_property
    def _can_batch(self) -> bool:
        """Whether left padding leaves an answer as it is. Asked when two answers run: it may take a probe of a second.

        Packing asks the same of a model: positions are those of `position_ids`, and masked tokens change nothing.
        """
        cache = next(answer.cache for answer in self._answers.values() if answer.num_cached)
        return is_attention_cache(cache) and why_not_packed(self._model, self._length) is None

    def _forward(self, answer: _Answer) -> torch.Tensor:
        """Logits (1, V) of the token after the answer's, from those of its ids that are not cached."""
        if self._longrope_switch is not None and answer.num_cached <= self._longrope_switch < answer.ids_1T.shape[1]:
            answer.cache, answer.num_cached = None, 0  # its keys were rotated by the frequencies of shorter texts
        options = {} if answer.cache is None else {self._cache_name: answer.cache}
        output = self._call(answer.request.base, input_ids=answer.ids_1T[:, answer.num_cached :], **options)
        answer.cache = None if self._cache_name is None else output.get(self._cache_name)
        if answer.cache is not None:  # a model that returns none reads the whole text for each token
            answer.num_cached = answer.ids_1T.shape[1]
        return output.logits[:, -1].float()

    def _forward_batch(self, batch: _Batch, base: bool) -> torch.Tensor:
        """Logits (B, V) of the tokens after the answers', of which the cache lacks the last token each."""
        ids_B1 = torch.cat([answer.ids_1T[:, -1:] for answer in batch.answers])
        length_B = torch.tensor([answer.ids_1T.shape[1] for answer in batch.answers], device=ids_B1.device)
        column_L = torch.arange(int(length_B.max()), device=ids_B1.device)
        mask_BL = (column_L >= length_B.max() - length_B[:, None]).long()
        output = self._call(
            base,
            input_ids=ids_B1,
            attention_mask=mask_BL,
            position_ids=length_B[:, None] - 1,
            **{self._cache_name: batch.cache},
        )
        batch.cache = output[self._cache_name]
        for answer in batch.answers:
            answer.num_cached = answer.ids_1T.shape[1]
        return output.logits[:, -1].float()

    def _call(self, base: bool, **inputs: Any) -> Any:
        with adapter_disabled(self._model) if base else nullcontext():
            return self._model(**inputs, **self._options)


@dataclass(eq=False)
class _Answer:
    """One slot: the ids of prompt and answer, the cache of those already read, and how to sample the next.

    `cache` is None before prefill, and while a batch holds it.
    """

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


class _Batch:
    """Answers that are decoded together, and their joined cache, whose rows are padded on the left."""

    def __init__(self) -> None:
        self.answers: list[_Answer] = []
        self.cache: DynamicCache | None = None

    def set_answers(self, answers: list[_Answer]) -> None:
        """Decode `answers` from now on. Where they are others than before, caches are split and joined again."""
        if answers == self.answers:
            return
        for index, answer in enumerate(self.answers):
            answer.cache = cache_row(self.cache, index, answer.num_cached)
        self.cache = join_caches([answer.cache for answer in answers]) if answers else None
        self.answers = answers
        for answer in answers:
            answer.cache = None


def is_attention_cache(cache: Any) -> bool:
    """Whether all that `cache` holds are keys and values by position, which can be padded."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(
        type(layer) in kinds and layer.keys is not None and layer.keys.dim() == 4 for layer in cache.layers
    )


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache whose rows are those of `caches`, each padded with zeros on the left."""
    return _with_layers(caches[0], [_join_layers(layers) for layers in zip(*(c.layers for c in caches), strict=True)])


def _join_layers(layers: Sequence[Any]) -> Any:
    joined = copy.copy(max(layers, key=lambda layer: layer.get_seq_length()))  # it counts the tokens of the longest
    capacity = max(layer.keys.shape[2] for layer in layers)  # a sliding window keeps fewer than all
    joined.keys, joined.values = (
        torch.cat([torch.nn.functional.pad(x, (0, 0, capacity - x.shape[2], 0)) for x in tensors])
        for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
    )
    return joined


def cache_row(cache: Any, index: int, length: int) -> DynamicCache:
    """The cache of one row, of which the last `length` positions are no padding."""
    layers = []
    for layer in cache.layers:
        row = copy.copy(layer)
        row.keys, row.values = (x[index : index + 1, :, -length:] for x in (layer.keys, layer.values))
        if isinstance(row, DynamicSlidingWindowLayer):
            row.cumulative_length = length
        layers.append(row)
    return _with_layers(cache, layers)


def _with_layers(cache: DynamicCache, layers: list[Any]) -> DynamicCache:
    made = copy.copy(cache)
    made.layers = layers
    return made


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
