"""What is served: a model under its names, and how a request becomes prompts for the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from time import time
from typing import Any

from parley.config import GenerationSection
from parley.data.conversation import Message
from parley.data.messages import conversation
from parley.data.render import render_prompt
from parley.errors import DataError, ParleyError
from parley.inference.fan_in import nth_seed
from parley.inference.scheduler import Request, Scheduler
from parley.serving.errors import ApiError, api_error
from parley.serving.metrics import Metrics
from parley.serving.protocol import Asking, ChatRequest, CompletionRequest
from parley.serving.streams import Answers
from parley.serving.tokens import TokenTexts


@dataclass(frozen=True)
class Served:
    """A model that answers under each of `names`, as it is, or (True) with its adapter switched off.

    `settings` hold where a request says nothing else, `system` is given to conversations without a system turn.
    `length`: tokens of a prompt and its answer; `vocabulary`: ids that the model has embeddings for.
    """

    tokenizer: Any
    names: dict[str, bool]
    settings: GenerationSection
    system: str | None
    length: int
    vocabulary: int


class Service:
    """Prompts, requests and their answers. Everything raises ApiError."""

    def __init__(self, served: Served, scheduler: Scheduler) -> None:
        self.served, self.scheduler = served, scheduler
        self.metrics = Metrics(scheduler)
        self.texts = TokenTexts(served.tokenizer)
        self.started = int(time())

    def uses_base(self, name: str) -> bool:
        if name not in self.served.names:
            message = f"model {name[:80]!r} is not served here; there is {' and '.join(self.served.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.served.names[name]

    def chat_prompt(self, asked: ChatRequest) -> list[int]:
        """The ids that ask for the next turn."""
        try:
            messages = conversation(asked.messages, "messages", "messages")
            if not messages:
                raise DataError("messages: no turn has words; say something")
            ids = self._render(messages, asked.offered)
        except ParleyError as error:
            raise api_error(error, "messages") from error
        self._check_length(ids, "messages")
        return ids

    def completion_prompts(self, asked: CompletionRequest) -> list[list[int]]:
        prompts = [
            self.served.tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
            for prompt in asked.prompt
        ]
        for ids in prompts:
            if not all(0 <= token < self.served.vocabulary for token in ids):
                message = f"prompt: got a token id outside 0..{self.served.vocabulary - 1}, which the model has not"
                raise ApiError(400, message, param="prompt")
            self._check_length(ids, "prompt")
        return prompts

    def submit(self, prompts: list[list[int]], asked: Asking, alternatives: int | None) -> Answers:
        """`asked.answers` answers to each prompt, in order; the seeds of all follow from the one given."""
        base, settings = self.uses_base(asked.model), asked.settings(self.served.settings)
        requests = []
        for number in range(len(prompts) * asked.answers):
            seeded = nth_seed(settings, number)
            requests.append(Request(prompts[number // asked.answers], seeded, base, alternatives))
        try:
            answers = Answers(self.scheduler, requests)
        except ParleyError as error:
            raise api_error(error) from error
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return answers

    def _render(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        if self.served.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.served.system}, *messages]
        ids = render_prompt(self.served.tokenizer, messages, tools)
        if tools and ids == render_prompt(self.served.tokenizer, messages):
            raise DataError("tools: the model's chat template writes no tools; leave them out")
        return ids

    def _check_length(self, ids: list[int], param: str) -> None:
        if not ids:
            raise ApiError(400, f"{param}: empty; say something", param=param)
        if len(ids) >= self.served.length:
            room = f"the context is {self.served.length}, the answer included"
            message = f"{param}: got {len(ids)} tokens and {room}; shorten it"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
