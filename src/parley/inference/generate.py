"""Answers from a model: through the fast decoder where it knows the model, else through transformers.

An Answerer keeps a decoder for many questions; `generate` and `stream` make one for a single call.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from queue import SimpleQueue
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.data.conversation import Message
from parley.inference import hf_generate as plain
from parley.inference.decoder import FastDecoder
from parley.inference.fan_in import FanIn, IndexedOutput, nth_seed
from parley.inference.hf_generate import inference_mode_of
from parley.inference.prompts import Tools, context_length, end_of_turn_ids, prompt_ids
from parley.inference.scheduler import OutputChunk, Request, Scheduler
from parley.models.adapters import require_base
from parley.train_step.bind import Unsupported

__all__ = ["Answerer", "end_of_turn_ids", "generate", "inference_mode_of", "stream"]

logger = logging.getLogger(__name__)

Engine = Literal["auto", "plain"]
LEAST_ROOM = 1024
"""Tokens of a slot, prompt and answer; doubled until a question fits."""


class Answerer:
    """Answers from `model`, with its weights as they are at the first question.

    A context manager: leaving it frees the decoder, as dropping it does.

    Args:
        slots: answers written at a time.
        engine: "auto" takes the fast decoder for every model it knows; "plain" always goes through transformers,
            where greedy answers are the same.
        copies: keep weights in the form that is quickest to read, where memory allows; does not pay for one call.

    `plain_because` says why the fast decoder is not taken, None while it is or nothing was asked yet.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 16,
        engine: Engine = "auto",
        copies: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.slots, self.copies = model, tokenizer, slots, copies
        self.plain_because: str | None = "engine: plain" if engine == "plain" else None
        self._scheduler: Scheduler | None = None
        self._freeing: weakref.finalize | None = None  # an Answerer that is dropped frees its decoder too
        self._room = 0

    def answers(
        self,
        conversations: Sequence[list[Message]],
        settings: GenerationSection,
        tools: Tools | None = None,
        base: bool = False,
    ) -> Generator[tuple[int, str]]:
        """The answer to each conversation with its number, as they are finished: free slots are filled at once.

        With `settings.seed` they are repeatable, and torch's random state is left alone. `base`: with the adapter
        switched off. Raises, before anything is answered, DataError for a conversation that fills the context and
        ModelError for the base of a model without an adapter.
        """
        self._check(base)
        prompts = [prompt_ids(self.model, self.tokenizer, messages, tools) for messages in conversations]
        scheduler = self._fast(prompts, settings)
        if scheduler is None:
            return self._plain_answers(prompts, settings, base)
        return _collected(scheduler, prompts, settings, base)

    def stream(
        self,
        messages: list[Message],
        settings: GenerationSection,
        tools: Tools | None = None,
        base: bool = False,
    ) -> Generator[str]:
        """One answer, piece by piece; closing the iterator stops it. Raises as `answers` does."""
        self._check(base)
        prompt = prompt_ids(self.model, self.tokenizer, messages, tools)
        scheduler = self._fast([prompt], settings)
        if scheduler is None:
            return self._plain_stream(prompt, settings, base)
        return _texts(scheduler.stream(Request(prompt, settings, base)))

    def close(self) -> None:
        """Free the decoder. The next question makes another."""
        if self._freeing is not None:
            self._freeing()
        self._scheduler, self._freeing, self._room = None, None, 0

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, base: bool) -> None:
        if base:
            require_base(self.model)

    def _fast(self, prompts: Sequence[list[int]], settings: GenerationSection) -> Scheduler | None:
        """The fast decoder's scheduler, with room for `prompts` and their answers; None where there is none."""
        if self.plain_because is not None or not prompts:
            return None
        room, needed = LEAST_ROOM, max(map(len, prompts)) + settings.max_new_tokens
        while room < needed:
            room *= 2
        room = min(room, context_length(self.model) or room)
        if room > self._room or self._scheduler is None or self._scheduler.error is not None:
            self.close()
            try:
                decoder = FastDecoder.of(self.model, slots=self.slots, length=room, copies=self.copies)
            except Unsupported as reason:
                self.plain_because = str(reason)
                logger.debug("answers go through transformers: %s", reason)
                return None
            self._scheduler = Scheduler(decoder, self.tokenizer, end_of_turn_ids(self.model, self.tokenizer))
            self._freeing = weakref.finalize(self, self._scheduler.close, drain=False)
            self._room = room
        return self._scheduler

    def _plain_answers(
        self, prompts: list[list[int]], settings: GenerationSection, base: bool
    ) -> Generator[tuple[int, str]]:
        with self.model.disable_adapter() if base else nullcontext():
            yield from enumerate(plain.answer(self.model, self.tokenizer, prompts, settings, self.slots))

    def _plain_stream(self, prompt: list[int], settings: GenerationSection, base: bool) -> Generator[str]:
        with self.model.disable_adapter() if base else nullcontext():
            yield from plain.stream(self.model, self.tokenizer, prompt, settings)


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    settings: GenerationSection,
    tools: Tools | None = None,
    batch_size: int = 16,
    *,
    base: bool = False,
    engine: Engine = "auto",
) -> list[str]:
    """Answer each conversation (messages that end before the assistant speaks); the answers' text, in order.

    `batch_size` are written at a time; an answer ends at an end-of-turn token, before a stop string, after
    `settings.max_new_tokens`, or where the model's context ends. With `settings.seed` the answers are repeatable and
    torch's global random state is left alone. `base` switches the adapter off; `engine` as in Answerer. Raises
    DataError for a prompt that fills the context.
    """
    slots = max(1, min(batch_size, len(conversations)))
    with Answerer(model, tokenizer, slots=slots, engine=engine, copies=False) as answerer:
        answers = dict(answerer.answers(conversations, settings, tools, base))
    return [answers[number] for number in range(len(conversations))]


def stream(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    settings: GenerationSection,
    tools: Tools | None = None,
    *,
    base: bool = False,
    engine: Engine = "auto",
) -> Generator[str]:
    """One answer, piece by piece as it is written; joined, the pieces are what `generate` returns.

    Closing or dropping the iterator stops the model within a burst of tokens. What goes wrong while generating is
    raised from the iterator. Raises DataError, before anything is generated, for a prompt that fills the context.
    """
    answerer = Answerer(model, tokenizer, slots=1, engine=engine, copies=False)
    return _closing_after(answerer, answerer.stream(messages, settings, tools, base))


def _closing_after(answerer: Answerer, pieces: Generator[str]) -> Generator[str]:
    with answerer, closing(pieces):
        yield from pieces


def _texts(pieces: Generator[OutputChunk]) -> Generator[str]:
    with closing(pieces):
        for piece in pieces:
            if piece.text:
                yield piece.text


def _collected(
    scheduler: Scheduler, prompts: Sequence[list[int]], settings: GenerationSection, base: bool
) -> Generator[tuple[int, str]]:
    queue: SimpleQueue[IndexedOutput] = SimpleQueue()
    texts = [""] * len(prompts)
    requests = [Request(prompt, nth_seed(settings, index), base) for index, prompt in enumerate(prompts)]
    fan_in = FanIn(scheduler, requests, queue.put)
    try:
        while fan_in.unfinished:
            index, output = fan_in.receive(queue.get())
            if isinstance(output, Exception):
                raise output
            texts[index] += output.text
            if output.finish_reason is not None:
                yield index, texts[index]
    finally:
        fan_in.cancel()
