"""Responses in OpenAI's form: one JSON body, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from parley.inference.interface import Token
from parley.inference.scheduler import OutputChunk
from parley.serving.token_text import TokenTexts
from parley.serving.tool_calls import may_be_call, tool_calls

Json = dict[str, Any]


@dataclass
class Choice:
    """One output so far. A stream may hold text back until it is known not to be a tool call."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)  # those whose text is part of `text`
    num_tokens: int = 0  # all sampled tokens, for the usage
    finish_reason: str | None = None
    sent: int = 0  # characters of `text` that were streamed
    sent_tokens: int = 0

    def add(self, chunk: OutputChunk) -> None:
        self.text += chunk.text
        # Tokens without text, such as the end of turn, count in the usage but have no logprobs entry.
        self.tokens += chunk.tokens[: len(chunk.tokens) - chunk.without_text]
        self.num_tokens += len(chunk.tokens)
        self.finish_reason = chunk.finish_reason

    def unsent(self) -> tuple[str, list[Token]]:
        text, tokens = self.text[self.sent :], self.tokens[self.sent_tokens :]
        self.sent, self.sent_tokens = len(self.text), len(self.tokens)
        return text, tokens


class GenerationResponse:
    """The response to one request: `n` choices for each prompt. Subclasses format the choices.

    `object_name`, `chunk_object_name`, `id_prefix`: OpenAI's names for the format.
    """

    object_name: str
    chunk_object_name: str
    id_prefix: str

    def __init__(self, model: str, num_choices: int, prompt_tokens: int, texts: TokenTexts, logprobs: bool) -> None:
        self.choices = [Choice() for _ in range(num_choices)]
        self._prompt_tokens, self._texts, self._logprobs = prompt_tokens, texts, logprobs
        self._header = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def add(self, index: int, chunk: OutputChunk) -> None:
        self.choices[index].add(chunk)

    def body(self) -> Json:
        choices = [self._format(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._header, "object": self.object_name, "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> Iterator[Json]:
        """The chunks that begin a stream."""
        yield from ()

    def new_chunks(self, index: int) -> Iterator[Json]:
        """What can be streamed since the last call for choice `index`."""
        for delta in self._deltas(index, self.choices[index]):
            yield self._chunk([delta])

    def usage_chunk(self) -> Json:
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> Json:
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._header, "object": self.chunk_object_name, "choices": choices}

    def _format(self, index: int, choice: Choice) -> Json:
        raise NotImplementedError

    def _deltas(self, index: int, choice: Choice) -> Iterator[Json]:
        raise NotImplementedError


class ChatResponse(GenerationResponse):
    object_name, chunk_object_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *args: Any, tools: list[Json] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tools = tools

    def first_chunks(self) -> Iterator[Json]:
        for index in range(len(self.choices)):
            yield self._chunk([self._delta(index, {"role": "assistant", "content": ""})])

    def _format(self, index: int, choice: Choice) -> Json:
        calls = self._calls(choice)
        message: Json = {"role": "assistant", "content": None if calls else choice.text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._format_logprobs(choice.tokens),
            "finish_reason": "tool_calls" if calls else choice.finish_reason,
        }

    def _deltas(self, index: int, choice: Choice) -> Iterator[Json]:
        """Text as it comes; text that may be a tool call is held back until that is known."""
        # Clients cannot take back content they were sent, and a call must not appear as content.
        if self._tools and choice.sent == 0 and may_be_call(choice.text) and not choice.finish_reason:
            return
        calls = self._calls(choice) if choice.sent == 0 else None
        text, tokens = choice.unsent()
        if calls:
            indexed = [{"index": call_index, **call} for call_index, call in enumerate(calls)]
            yield self._delta(index, {"tool_calls": indexed}, tokens)
        # A token may be part of a character: it has no text yet, but a logprob to report.
        elif text or (tokens and self._logprobs):
            yield self._delta(index, {"content": text}, tokens)
        if choice.finish_reason:
            yield self._delta(index, {}, finish="tool_calls" if calls else choice.finish_reason)

    def _calls(self, choice: Choice) -> list[Json] | None:
        # A call cut off by the token limit is incomplete JSON, so it stays text.
        return tool_calls(choice.text, self._tools) if self._tools and choice.finish_reason == "stop" else None

    def _delta(self, index: int, delta: Json, tokens: list[Token] | None = None, finish: str | None = None) -> Json:
        logprobs = self._format_logprobs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _format_logprobs(self, tokens: list[Token]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    **self._format_token(token.id, token.logprob),
                    "top_logprobs": [self._format_token(*candidate) for candidate in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _format_token(self, token: int, logprob: float | None) -> Json:
        return {
            "token": self._texts.text_of(token),
            "logprob": logprob,
            "bytes": list(self._texts.bytes_of(token)),
        }


class CompletionResponse(GenerationResponse):
    object_name = chunk_object_name = "text_completion"
    id_prefix = "cmpl"

    def _format(self, index: int, choice: Choice) -> Json:
        return self._format_piece(index, choice.text, choice.tokens, 0, choice.finish_reason)

    def _deltas(self, index: int, choice: Choice) -> Iterator[Json]:
        offset = choice.sent
        text, tokens = choice.unsent()
        if text or choice.finish_reason:
            yield self._format_piece(index, text, tokens, offset, choice.finish_reason)

    def _format_piece(self, index: int, text: str, tokens: list[Token], offset: int, finish: str | None) -> Json:
        logprobs = self._format_logprobs(tokens, offset) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _format_logprobs(self, tokens: list[Token], offset: int) -> Json:
        """`text_offset` counts characters of the output, the prompt excluded."""
        texts = [self._texts.text_of(token.id) for token in tokens]
        offsets = [offset]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._texts.text_of(id): logprob for id, logprob in token.top} for token in tokens],
            "text_offset": offsets[: len(tokens)],
        }
