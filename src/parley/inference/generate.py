"""Answers from a model, whichever backend decodes it.

A Generator keeps a decoder for many questions; `generate` and `stream` make one for a single call.
"""

from __future__ import annotations

import logging
import weakref
from collections import abc
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parley.config import GenerationSection
from parley.data.example import Message
from parley.data.supervision import ControlText
from parley.errors import DeviceError, ParleyError
from parley.inference.decoder import StaticCacheDecoder
from parley.inference.fan_in import FanIn, IndexedOutput, nth_seed
from parley.inference.hf import TransformersDecoder, inference_mode_of
from parley.inference.interface import Decoder
from parley.inference.prompts import Tools, context_length, end_of_turn_ids, prompt_ids
from parley.inference.scheduler import Request, Scheduler
from parley.models.base_answers import require_base
from parley.models.device import describe_device
from parley.train_step.bind import Unsupported, longrope_switch

__all__ = ["Generator", "end_of_turn_ids", "generate", "inference_mode_of", "make_decoder", "stream"]

logger = logging.getLogger(__name__)

Engine = Literal["auto", "plain"]
MIN_LENGTH = 1024
"""Tokens of a slot, prompt and answer; doubled until a question fits, so that few decoders are made."""


class Generator:
    """Answers from `model`, with its weights as they are at the first question.

    A context manager: leaving it frees the decoder, as dropping it does.

    Args:
        slots: answers generated at a time.
        engine: "auto" takes Parley's own decoder for every model it knows; "plain" always goes through transformers,
            where greedy answers are the same.
        fuse: keep weights in the form that is fastest to read, where memory allows; does not pay for one call.

    `plain_because` says why the answers go through transformers, None while they do not or nothing was asked yet.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 16,
        engine: Engine = "auto",
        fuse: bool = True,
        control_tokens: ControlText = "auto",
    ) -> None:
        self.control_tokens = control_tokens
        self.model, self.tokenizer, self.slots, self.fuse = model, tokenizer, slots, fuse
        self.plain_because: str | None = "engine: plain" if engine == "plain" else None
        self._scheduler: Scheduler | None = None
        self._finalizer: weakref.finalize | None = None  # frees the decoder of a Generator that is dropped
        self._length = 0

    def prompt_ids(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """The rendered conversation with the generation prompt. Raises DataError where it fills the model's context."""
        return prompt_ids(self.model, self.tokenizer, messages, tools, self.control_tokens)

    def answers(
        self,
        conversations: Sequence[list[Message]],
        settings: GenerationSection,
        tools: Tools | None = None,
        base: bool = False,
    ) -> abc.Generator[tuple[int, str]]:
        """The answer to each conversation with its index, as they are finished: free slots are filled at once.

        With `settings.seed` they are repeatable, and torch's random state is left alone. `base`: with the adapter
        disabled.

        Raises, before anything is generated, ModelError for the base of a model without an adapter, and DataError for a
        conversation that fills the context.
        """
        self._check(base)
        return self._answers(
            [self._request(index, messages, settings, tools, base) for index, messages in enumerate(conversations)]
        )

    def _answers(self, requests: Sequence[Request]) -> abc.Generator[tuple[int, str]]:
        with closing(self._results(requests)) as results:
            for index, answer in results:
                if isinstance(answer, Exception):
                    raise answer
                yield index, answer

    def answers_or_errors(
        self,
        conversations: Sequence[list[Message]],
        settings: GenerationSection,
        tools: Tools | None = None,
        base: bool = False,
    ) -> abc.Generator[tuple[int, str | ParleyError]]:
        """`answers`, where a conversation that cannot be answered gives its error and the others are answered.

        Errors that are known before anything is generated come first.
        """
        self._check(base)
        requests: dict[int, Request] = {}
        errors: dict[int, ParleyError] = {}
        for index, messages in enumerate(conversations):
            try:
                requests[index] = self._request(index, messages, settings, tools, base)
            except ParleyError as error:
                errors[index] = error
        return self._answers_or_errors(requests, errors)

    def _answers_or_errors(
        self, requests: dict[int, Request], errors: dict[int, ParleyError]
    ) -> abc.Generator[tuple[int, str | ParleyError]]:
        yield from errors.items()
        indices = list(requests)
        with closing(self._results(list(requests.values()))) as results:
            for position, answer in results:
                if isinstance(answer, Exception) and not isinstance(answer, ParleyError):
                    raise answer
                yield indices[position], answer

    def _request(
        self, index: int, messages: list[Message], settings: GenerationSection, tools: Tools | None, base: bool
    ) -> Request:
        return Request(self.prompt_ids(messages, tools), nth_seed(settings, index), base)

    def outputs(self, requests: Sequence[Request]) -> abc.Generator[IndexedOutput]:
        """The answers to `requests` side by side, piece by piece, each with the request's index, or its exception.

        Requests with and without `base` are decoded in the same batch. Closing the iterator stops all of them. Raises
        as `answers` does, and QueueFull or Closed.
        """
        for request in requests:
            self._check(request.base)
        return self._outputs(requests)

    def _outputs(self, requests: Sequence[Request]) -> abc.Generator[IndexedOutput]:
        if requests:
            with self._open_scheduler(requests) as scheduler, closing(_outputs(scheduler, requests)) as outputs:
                yield from outputs

    def _results(self, requests: Sequence[Request]) -> abc.Generator[tuple[int, str | Exception]]:
        if requests:
            with self._open_scheduler(requests) as scheduler, closing(_collect(scheduler, requests)) as results:
                yield from results

    def stream(
        self,
        messages: list[Message],
        settings: GenerationSection,
        tools: Tools | None = None,
        base: bool = False,
    ) -> abc.Generator[str]:
        """One answer, piece by piece; closing the iterator stops it. Raises as `answers` does."""
        self._check(base)
        prompt = self.prompt_ids(messages, tools)
        return self._stream(Request(prompt, settings, base))

    def _stream(self, request: Request) -> abc.Generator[str]:
        with self._open_scheduler([request]) as scheduler, closing(scheduler.stream(request)) as chunks:
            for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    def close(self) -> None:
        """Free the decoder. The next question makes another."""
        if self._finalizer is not None:
            self._finalizer()
        self._scheduler, self._finalizer, self._length = None, None, 0

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, base: bool) -> None:
        if base:
            require_base(self.model)

    @contextmanager
    def _open_scheduler(self, requests: Sequence[Request]) -> Iterator[Scheduler]:
        """The kept scheduler with slots long enough for `requests`, or one through transformers for this call alone.

        transformers' models are only in evaluation mode while they decode: the decode loop has ended on leaving.
        """
        length = self._length_for(requests)
        fits = not self._passes_longrope_switch(requests)
        if fits and (scheduler := self._static_cache_scheduler(length)) is not None:
            yield scheduler
            return
        with inference_mode_of(self.model):
            decoder = TransformersDecoder(self.model, slots=min(self.slots, len(requests)), length=length)
            with Scheduler(decoder, self.tokenizer, end_of_turn_ids(self.model, self.tokenizer)) as scheduler:
                yield scheduler

    def _passes_longrope_switch(self, requests: Sequence[Request]) -> bool:
        """Whether a text may become longer than those that longrope has its short factors for."""
        switch = longrope_switch(self.model.config)
        if switch is None or self.plain_because is not None or _longest(requests) <= switch:
            return False
        logger.info(
            "answers go through transformers, which is slower: longrope has other frequencies for texts of more than "
            "%s tokens, prompt and max_new_tokens together",
            f"{switch:,}",
        )
        return True

    def _length_for(self, requests: Sequence[Request]) -> int:
        # Doubling keeps the number of decoders of a growing chat logarithmic in its length.
        length, needed = MIN_LENGTH, _longest(requests)
        while length < needed:
            length *= 2
        return min(length, context_length(self.model) or length)

    def _static_cache_scheduler(self, length: int) -> Scheduler | None:
        """The kept scheduler; None where the model has no decoder of Parley's own."""
        if self.plain_because is not None:
            return None
        if length > self._length or self._scheduler is None or self._scheduler.error is not None:
            self.close()  # the old decoder first: two would not fit into memory where one does
            try:
                decoder = StaticCacheDecoder.of(self.model, slots=self.slots, length=length, fuse=self.fuse)
            except Unsupported as reason:
                self.plain_because = str(reason)
                logger.debug("answers go through transformers: %s", reason)
                return None
            self._scheduler = Scheduler(decoder, self.tokenizer, end_of_turn_ids(self.model, self.tokenizer))
            # Not __del__: the finalizer also runs at interpreter exit, where the thread would keep the process.
            self._finalizer = weakref.finalize(self, self._scheduler.close, drain=False)
            self._length = length
        return self._scheduler


def _longest(requests: Sequence[Request]) -> int:
    """Tokens that prompt and answer of a request may have."""
    return max(len(request.prompt_ids) + request.settings.max_new_tokens for request in requests)


def make_decoder(model: PreTrainedModel | PeftModel, *, slots: int, length: int) -> Decoder:
    """Parley's own decoder where it knows the model, warmed up, else one through transformers.

    `length` is cut to the model's positions. Raises DeviceError where so many slots do not fit into memory.
    """
    length = min(length, context_length(model) or length)
    try:
        decoder = StaticCacheDecoder.of(model, slots=slots, length=length)
        decoder.warm_up()  # inside the try: capturing graphs takes memory, too
    except Unsupported as reason:
        logger.info("answers go through transformers, which is slower: %s", reason)
        return TransformersDecoder(model, slots=slots, length=length)
    except torch.OutOfMemoryError:
        answers = f"{slots} answers of {length} tokens do not fit into {describe_device(model.device)} beside the model"
        raise DeviceError(f"{answers}; lower --max-num-seqs or --max-model-len") from None
    if decoder.length < length:
        logger.warning(
            "a request holds at most %s tokens, its answer included: for longer texts longrope has other frequencies, "
            "which Parley's decoder does not read",
            f"{decoder.length:,}",
        )
    return decoder


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
    control_tokens: ControlText = "auto",
) -> list[str]:
    """Answer each conversation (messages that end before the assistant's turn); the answers' text, in order.

    `batch_size` are generated at a time; an answer ends at an end-of-turn token, before a stop string, after
    `settings.max_new_tokens`, or where the model's context ends. With `settings.seed` the answers are repeatable and
    torch's global random state is left alone. `base` disables the adapter; `engine` and `control_tokens` as in
    Generator. Raises DataError for a prompt that fills the context.
    """
    slots = max(1, min(batch_size, len(conversations)))
    # fuse=False: copying all weights costs more than one call gains.
    with Generator(
        model, tokenizer, slots=slots, engine=engine, fuse=False, control_tokens=control_tokens
    ) as generator:
        answers = dict(generator.answers(conversations, settings, tools, base))
    return [answers[index] for index in range(len(conversations))]


def stream(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    settings: GenerationSection,
    tools: Tools | None = None,
    *,
    base: bool = False,
    engine: Engine = "auto",
) -> abc.Generator[str]:
    """One answer, piece by piece as it is generated; joined, the pieces are what `generate` returns.

    Closing or dropping the iterator stops the model within a few tokens. What goes wrong while generating is raised
    from the iterator. Raises DataError, before anything is generated, for a prompt that fills the context.
    """
    generator = Generator(model, tokenizer, slots=1, engine=engine, fuse=False)
    return _closing_after(generator, generator.stream(messages, settings, tools, base))


def _closing_after(generator: Generator, pieces: abc.Generator[str]) -> abc.Generator[str]:
    with generator, closing(pieces):
        yield from pieces


def _collect(scheduler: Scheduler, requests: Sequence[Request]) -> abc.Generator[tuple[int, str | Exception]]:
    """The whole answer to each request, or the exception that ended it, as they are finished."""
    texts = [""] * len(requests)
    with closing(_outputs(scheduler, requests)) as outputs:
        for index, output in outputs:
            if isinstance(output, Exception):
                yield index, output
                continue
            texts[index] += output.text
            if output.finish_reason is not None:
                yield index, texts[index]


def _outputs(scheduler: Scheduler, requests: Sequence[Request]) -> abc.Generator[IndexedOutput]:
    """The chunks of all requests, or the exceptions that ended them, as they come; closing it cancels the rest."""
    queue: SimpleQueue[IndexedOutput] = SimpleQueue()
    fan_in = FanIn(scheduler, requests, queue.put)
    try:
        while fan_in.unfinished:
            yield fan_in.receive(queue.get())
    finally:
        fan_in.cancel()
