"""Answers from a model, through transformers' own `generate` with its KV cache.

This is the plain path: every causal model of transformers, with or without an adapter, quantised or not. It
may be called in the middle of training: `inference_mode_of` leaves the model as it was found.

Shapes: B prompts, T tokens of the longest prompt (left padded).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from parley.config import GenerationSection
from parley.data.conversation import Message
from parley.data.render import render, render_prompt
from parley.errors import DataError

Tools = list[dict[str, Any]]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    settings: GenerationSection,
    tools: Tools | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Answer each conversation (messages that end before the assistant speaks); the answers' text, in order.

    Prompts are left padded and answered `batch_size` at a time; an answer ends at an end-of-turn token, after
    `settings.max_new_tokens`, or where the model's context ends. With `settings.seed` the answers are
    repeatable and torch's global random state is left alone. Raises DataError for a prompt that fills the
    context.
    """
    prompts = [_prompt(model, tokenizer, messages, tools) for messages in conversations]
    config = generation_config(model, tokenizer, settings)
    answers: list[str] = []
    with inference_mode_of(model):
        for first in range(0, len(prompts), batch_size):
            inputs = _left_padded(prompts[first : first + batch_size], config.pad_token_id, model.device)
            with _seeded(settings.seed, model.device):
                ids_BT = model.generate(**inputs, generation_config=config, stopping_criteria=_stops(model, inputs))
            new_ids = ids_BT[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return answers


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    settings: GenerationSection,
    tools: Tools | None = None,
) -> Generator[str]:
    """One answer, piece by piece as it is written; joined, the pieces are what `generate` returns.

    Closing or dropping the iterator stops the model within a token. What goes wrong while generating is
    raised from the iterator. Raises DataError, before anything is generated, for a prompt that fills the context.
    """
    prompt = _prompt(model, tokenizer, messages, tools)
    return _pieces(model, tokenizer, prompt, generation_config(model, tokenizer, settings), settings.seed)


def _pieces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    config: GenerationConfig,
    seed: int | None,
) -> Generator[str]:
    inputs = _left_padded([prompt], config.pad_token_id, model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = threading.Event()
    stops = _stops(model, inputs, _Abandoned(abandoned))

    def work() -> None:
        with _seeded(seed, model.device):
            model.generate(**inputs, generation_config=config, stopping_criteria=stops, streamer=streamer)

    with (
        inference_mode_of(model),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="parley-stream") as thread,
    ):
        answer = thread.submit(work)
        answer.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))  # also after an error
        try:
            yield from filter(None, streamer)
        finally:
            abandoned.set()
        answer.result()


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
        use_cache=True,
    )


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the checkpoint's, the tokenizer's and the chat template's own."""
    declared = model.generation_config.eos_token_id
    ends = set(declared if isinstance(declared, list) else [declared])
    ends |= {tokenizer.eos_token_id, _end_of_turn_in_template(tokenizer)}
    return sorted(end for end in ends if end is not None)


def _end_of_turn_in_template(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that training teaches to end a turn with: the last one supervised in a rendered turn."""
    turn = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    learned = [token for token, trained in zip(turn.input_ids, turn.mask, strict=True) if trained]
    return learned[-1] if learned and learned[-1] in tokenizer.added_tokens_decoder else None


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


def _prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools | None
) -> list[int]:
    prompt = render_prompt(tokenizer, messages, tools)
    context = _context_length(model)
    if context is not None and len(prompt) >= context:
        raise DataError(
            f"the conversation is {len(prompt)} tokens and the model's context is {context}; "
            "shorten it or start a new one"
        )
    return prompt


def _context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for; None where it sets no limit."""
    return model.config.get_text_config().to_dict().get("max_position_embeddings")


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
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


class _Abandoned(StoppingCriteria):
    """Ends all rows once nobody listens."""

    def __init__(self, abandoned: threading.Event) -> None:
        self.abandoned = abandoned

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.abandoned.is_set(), device=input_ids.device)


def _stops(model: PreTrainedModel, inputs: dict[str, torch.Tensor], *more: StoppingCriteria) -> StoppingCriteriaList:
    context = _context_length(model)
    ends = [] if context is None else [_ContextEnd(context, inputs["attention_mask"])]
    return StoppingCriteriaList([*ends, *more])
