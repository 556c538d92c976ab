"""What is served: a model under its names, and how a request becomes prompts for the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import time
from typing import Any, TypeVar

from parley.config import GenerationSection
from parley.data.control_tokens import strings
from parley.data.example import Message
from parley.data.messages import parse_messages, with_system
from parley.data.render import render_prompt
from parley.data.supervision import ControlText
from parley.data.template_settings import check_settings, with_row_settings
from parley.errors import DataError, ParleyError
from parley.inference.fan_in import nth_seed
from parley.inference.scheduler import Request, Scheduler
from parley.serving.errors import ApiError, to_api_error
from parley.serving.metrics import Metrics
from parley.serving.output_stream import OutputStream
from parley.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from parley.serving.token_text import TokenTexts

PARSE_THREADS = 2  # so many requests are parsed and tokenized at a time: a large one takes 100 times its size

Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it.

    Attributes:
        names: names it is served under; True marks the base model, the adapter switched off.
        settings: generation settings of requests that set nothing else.
        system: system turn of conversations that bring none.
        max_model_len: tokens of a prompt and its output.
        vocab_size: rows of the input embedding.
        control_tokens: how control-token text in messages is encoded, as in training.
    """

    tokenizer: Any
    names: dict[str, bool]
    settings: GenerationSection
    system: str | None
    max_model_len: int
    vocab_size: int
    control_tokens: ControlText = "auto"


class Service:
    """Turns requests into prompts and submits them. Every method raises ApiError."""

    def __init__(self, model: ServedModel, scheduler: Scheduler) -> None:
        self.model, self.scheduler = model, scheduler
        self.metrics = Metrics(scheduler)
        self.texts = TokenTexts(model.tokenizer)
        self.started = int(time())
        self._threads = ThreadPoolExecutor(PARSE_THREADS, thread_name_prefix="parley-parse")
        self._max_prompt_bytes = model.max_model_len * _longest_token(model.tokenizer)

    def uses_base(self, name: str) -> bool:
        """Whether `name` is the base model."""
        if name not in self.model.names:
            message = f"model {name[:80]!r} is not served here; there is {' and '.join(self.model.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.model.names[name]

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a slow function off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        """The prompt ids of a conversation, generation prompt included."""
        # Before the template and the tokenizer run: their memory is many times the size of the text.
        self._check_size(strings([body.messages, body.offered_tools]), len(body.messages), "messages")
        try:
            messages = parse_messages(body.messages, "messages", "messages")
            if not messages:
                raise DataError("messages: all turns are empty; wanted at least one with content")
            ids = self._render(messages, body.offered_tools, body.chat_template_kwargs)
        except ParleyError as error:
            raise to_api_error(error, "messages") from error
        self._check_ids(ids, "messages")
        return ids

    def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        """The ids of each prompt."""
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                self._check_size([prompt], 1, "prompt")
                prompt = _encode_text(self.model.tokenizer, prompt)
            self._check_ids(prompt, "prompt")
            prompts.append(prompt)
        return prompts

    def submit(self, prompts: list[list[int]], body: GenerationRequest, num_top_logprobs: int | None) -> OutputStream:
        """Start `body.num_choices` outputs for each prompt, in order. With a seed, output i gets seed + i."""
        base, settings = self.uses_base(body.model), body.generation_settings(self.model.settings)
        requests = []
        for index in range(len(prompts) * body.num_choices):
            prompt = prompts[index // body.num_choices]
            requests.append(Request(prompt, nth_seed(settings, index), base, num_top_logprobs))
        try:
            outputs = OutputStream(self.scheduler, requests)
        except ParleyError as error:
            raise to_api_error(error) from error
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return outputs

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, settings: dict[str, Any] | None
    ) -> list[int]:
        tokenizer, control_tokens = self.model.tokenizer, self.model.control_tokens
        if settings:
            check_settings(tokenizer, settings, "chat_template_kwargs")
            tokenizer = with_row_settings(tokenizer, settings)
        messages = with_system(messages, self.model.system)
        ids = render_prompt(tokenizer, messages, tools, control_tokens)
        # Otherwise the model would answer without knowing of the tools, and the client would wait for calls.
        if tools and ids == render_prompt(tokenizer, messages, None, control_tokens):
            raise DataError("tools: the model's chat template ignores tools; leave them out")
        return ids

    def _check_size(self, texts: Iterable[str], num_turns: int, param: str) -> None:
        """Refuses before tokenizing what cannot fit: more bytes than the longest token times the context."""
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_prompt_bytes or num_turns > self.model.max_model_len:
            raise self._too_long(
                f"{size} bytes in {num_turns} turns" if param == "messages" else f"{size} bytes", param
            )

    def _check_ids(self, ids: list[int], param: str) -> None:
        if not ids:
            raise ApiError(400, f"{param}: empty; wanted at least one token", param=param)
        if len(ids) >= self.model.max_model_len:
            raise self._too_long(f"{len(ids)} tokens", param)
        # The decoder cannot survive an id past the embedding on a GPU, and the tokenizer may have more words than that.
        outside = next((token for token in ids if not 0 <= token < self.model.vocab_size), None)
        if outside is not None:
            message = f"{param}: got token id {outside}; the model's embedding has ids 0 to {self.model.vocab_size - 1}"
            raise ApiError(400, message, param=param)

    def _too_long(self, got: str, param: str) -> ApiError:
        message = (
            f"{param}: got {got} and the context is {self.model.max_model_len} tokens, output included; shorten it"
        )
        return ApiError(400, message, param=param, code="context_length_exceeded")


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text prompt, with exactly one beginning-of-text token where the tokenizer has one, as in training.

    The tokenizer's own special tokens are left out: it would put a second beginning before the prompt's own, and some
    tokenizers put none, others an end after the prompt.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begins = tokenizer.bos_token is None or text.startswith(tokenizer.bos_token)
    return ids if begins else [tokenizer.bos_token_id, *ids]


def _longest_token(tokenizer: Any) -> int:
    """Upper bound of the bytes of one token; at least 16, as an unknown word is one token too."""
    return max(16, *(len(token.encode()) for token in tokenizer.get_vocab()))
