"""Answers through transformers' own `generate`: every causal model, with or without an adapter, quantised or not.

May be called in the middle of training: `inference_mode_of` leaves the model as it was found.

Shapes: B prompts, T tokens of the longest prompt (left padded).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from parley.config import GenerationSection
from parley.inference.hf_decoder import TransformersDecoder
from parley.inference.prompts import context_length, end_of_turn_ids
from parley.inference.scheduler import Request, Scheduler


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    settings: GenerationSection,
    batch_size: int,
) -> Iterator[str]:
    """The answers to `prompts`, in order, as each batch is done."""
    config = generation_config(model, tokenizer, settings)
    with inference_mode_of(model):
        for first in range(0, len(prompts), batch_size):
            inputs = _left_padded(prompts[first : first + batch_size], config.pad_token_id, model.device)
            with _seeded(None if settings.seed is None else settings.seed + first, model.device):
                ids_BT = model.generate(
                    **inputs, generation_config=config, stopping_criteria=_stops(model, inputs), tokenizer=tokenizer
                )
            new_ids = ids_BT[:, inputs["input_ids"].shape[1] :]
            for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True):
                yield _before_stop(text, settings.stop)


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], settings: GenerationSection
) -> Generator[str]:
    """One answer, piece by piece. Closing the iterator stops the model within a token."""
    length = context_length(model) or len(prompt) + settings.max_new_tokens
    with inference_mode_of(model):
        decoder = TransformersDecoder(model, slots=1, length=length)
        with Scheduler(decoder, tokenizer, end_of_turn_ids(model, tokenizer)) as scheduler:
            for piece in scheduler.stream(Request(prompt, settings)):
                if piece.text:
                    yield piece.text


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSection
) -> GenerationConfig:
    """Parley's settings in transformers' words; all are given, so a checkpoint's own defaults stay out."""
    ends = end_of_turn_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    sampling = {"temperature": 1.0, "top_k": 50}  # transformers' own, which it does not warn about when greedy
    if settings.temperature > 0:
        sampling = settings.model_dump(include={"temperature", "min_p", "top_p", "top_k"})
    return GenerationConfig(
        **sampling,
        do_sample=settings.temperature > 0,
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
        stop_strings=settings.stop or None,
        use_cache=True,
    )


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


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    T = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (T - len(ids)) + ids for ids in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
    }


class _ContextEnd(StoppingCriteria):
    """Ends a row where its own tokens, padding aside, fill the model's context."""

    def __init__(self, context: int, attention_mask_BT: torch.Tensor) -> None:
        padding_B = (attention_mask_BT == 0).sum(dim=1)
        self.end_B = context + padding_B

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.end_B


def _stops(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> StoppingCriteriaList:
    context = context_length(model)
    return StoppingCriteriaList([] if context is None else [_ContextEnd(context, inputs["attention_mask"])])


def _before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first, the longest of those that are."""
    found = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text
