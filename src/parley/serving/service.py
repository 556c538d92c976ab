"""What is served: a model under its names, and how a request becomes prompts for the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import Any

from parley.config import GenerationSection
from parley.data.conversation import Message
from parley.data.messages import parse_messages, with_system
from parley.data.render import render_prompt
from parley.errors import DataError, ParleyError
from parley.inference.fan_in import nth_seed
from parley.inference.scheduler import Request, Scheduler
from parley.serving.errors import ApiError, to_api_error
from parley.serving.metrics import Metrics
from parley.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from parley.serving.streams import OutputStream
from parley.serving.token_text import TokenTexts


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it.

    Attributes:
        names: names it is served under; True marks the base model, the adapter switched off.
        settings: generation settings of requests that set nothing else.
        system: system turn of conversations that bring none.
        max_model_len: tokens of a prompt and its output.
        vocab_size: rows of the input embedding.
    """

    tokenizer: Any
    names: dict[str, bool]
    settings: GenerationSection
    system: str | None
    max_model_len: int
    vocab_size: int


class Service:
    """Turns requests into prompts and submits them. Every method raises ApiError."""

    def __init__(self, model: ServedModel, scheduler: Scheduler) -> None:
        self.model, self.scheduler = model, scheduler
        self.metrics = Metrics(scheduler)
        self.texts = TokenTexts(model.tokenizer)
        self.started = int(time())

    def uses_base(self, name: str) -> bool:
        """Whether `name` is the base model."""
        if name not in self.model.names:
            message = f"model {name[:80]!r} is not served here; there is {' and '.join(self.model.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.model.names[name]

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        """The prompt ids of a conversation, generation prompt included."""
        try:
            messages = parse_messages(body.messages, "messages", "messages")
            if not messages:
                raise DataError("messages: all turns are empty; wanted at least one with content")
            ids = self._render(messages, body.offered_tools)
        except ParleyError as error:
            raise to_api_error(error, "messages") from error
        self._check_length(ids, "messages")
        return ids

    def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        """The ids of each prompt."""
        prompts = [
            self.model.tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        ]
        for ids in prompts:
            if not all(0 <= token < self.model.vocab_size for token in ids):
                message = f"prompt: got a token id outside 0..{self.model.vocab_size - 1}, the model's vocabulary"
                raise ApiError(400, message, param="prompt")
            self._check_length(ids, "prompt")
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

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        messages = with_system(messages, self.model.system)
        ids = render_prompt(self.model.tokenizer, messages, tools)
        if tools and ids == render_prompt(self.model.tokenizer, messages):
            raise DataError("tools: the model's chat template ignores tools; leave them out")
        return ids

    def _check_length(self, ids: list[int], param: str) -> None:
        if not ids:
            raise ApiError(400, f"{param}: empty; wanted at least one token", param=param)
        if len(ids) >= self.model.max_model_len:
            message = (
                f"{param}: got {len(ids)} tokens and the context is {self.model.max_model_len}, output included; "
                "shorten it"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
