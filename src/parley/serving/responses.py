"""Answers as OpenAI's API writes them: whole, or in chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from parley.inference.interface import Token
from parley.inference.scheduler import OutputChunk
from parley.serving.tokens import TokenTexts
from parley.serving.tool_calls import may_be_call, tool_calls

Json = dict[str, Any]


@dataclass
class Answer:
    """One answer so far: what was told of it, and what is kept back until it is known to be no tool call."""

    text: str = ""
    seen: list[Token] = field(default_factory=list)
    drawn: int = 0
    finish: str | None = None
    sent: int = 0  # characters of `text` that a stream has told
    sent_tokens: int = 0

    def add(self, chunk: OutputChunk) -> None:
        self.text += chunk.text
        self.seen += chunk.tokens[: len(chunk.tokens) - chunk.without_text]
        self.drawn += len(chunk.tokens)
        self.finish = chunk.finish_reason

    def unsent(self) -> tuple[str, list[Token]]:
        text, tokens = self.text[self.sent :], self.seen[self.sent_tokens :]
        self.sent, self.sent_tokens = len(self.text), len(self.seen)
        return text, tokens


class Reply:
    """The reply to one request: `n` answers to each prompt, in one format. Subclasses write the choices."""

    whole_kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, model: str, answers: int, prompt_tokens: int, texts: TokenTexts, logprobs: bool) -> None:
        self.answers = [Answer() for _ in range(answers)]
        self._prompt_tokens, self._texts, self._logprobs = prompt_tokens, texts, logprobs
        self._frame = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def add(self, index: int, chunk: OutputChunk) -> None:
        self.answers[index].add(chunk)

    def whole(self) -> Json:
        choices = [self._choice(index, answer) for index, answer in enumerate(self.answers)]
        return {**self._frame, "object": self.whole_kind, "choices": choices, "usage": self.usage()}

    def opening(self) -> Iterator[Json]:
        """The chunks that begin a stream."""
        yield from ()

    def chunks(self, index: int) -> Iterator[Json]:
        """What can be told after a piece was added to answer `index`."""
        for choice in self._deltas(index, self.answers[index]):
            yield self._chunk([choice])

    def usage_chunk(self) -> Json:
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> Json:
        drawn = sum(answer.drawn for answer in self.answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self._prompt_tokens + drawn,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._frame, "object": self.chunk_kind, "choices": choices}

    def _choice(self, index: int, answer: Answer) -> Json:
        raise NotImplementedError

    def _deltas(self, index: int, answer: Answer) -> Iterator[Json]:
        raise NotImplementedError


class ChatReply(Reply):
    whole_kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, *args: Any, tools: list[Json] | None, **named: Any) -> None:
        super().__init__(*args, **named)
        self._tools = tools

    def opening(self) -> Iterator[Json]:
        for index in range(len(self.answers)):
            yield self._chunk([self._delta(index, {"role": "assistant", "content": ""})])

    def _choice(self, index: int, answer: Answer) -> Json:
        calls = self._calls(answer)
        message: Json = {"role": "assistant", "content": None if calls else answer.text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logs(answer.seen),
            "finish_reason": "tool_calls" if calls else answer.finish,
        }

    def _deltas(self, index: int, answer: Answer) -> Iterator[Json]:
        """Text as it comes; an answer that may be a tool call is kept back until it is known."""
        if self._tools and answer.sent == 0 and may_be_call(answer.text) and not answer.finish:
            return
        calls = self._calls(answer) if answer.sent == 0 else None
        text, tokens = answer.unsent()
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            yield self._delta(index, {"tool_calls": numbered}, tokens)
        elif text or (tokens and self._logprobs):
            yield self._delta(index, {"content": text}, tokens)
        if answer.finish:
            yield self._delta(index, {}, finish="tool_calls" if calls else answer.finish)

    def _calls(self, answer: Answer) -> list[Json] | None:
        return tool_calls(answer.text, self._tools) if self._tools and answer.finish == "stop" else None

    def _delta(self, index: int, delta: Json, tokens: list[Token] | None = None, finish: str | None = None) -> Json:
        logs = self._logs(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": logs, "finish_reason": finish}

    def _logs(self, tokens: list[Token]) -> Json | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {**self._log(token.id, token.logprob), "top_logprobs": [self._log(*other) for other in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _log(self, token: int, logprob: float | None) -> Json:
        return {
            "token": self._texts.text_of(token),
            "logprob": logprob,
            "bytes": list(self._texts.bytes_of(token)),
        }


class CompletionReply(Reply):
    whole_kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _choice(self, index: int, answer: Answer) -> Json:
        return self._piece(index, answer.text, answer.seen, 0, answer.finish)

    def _deltas(self, index: int, answer: Answer) -> Iterator[Json]:
        offset = answer.sent
        text, tokens = answer.unsent()
        if text or answer.finish:
            yield self._piece(index, text, tokens, offset, answer.finish)

    def _piece(self, index: int, text: str, tokens: list[Token], offset: int, finish: str | None) -> Json:
        logs = self._logs(tokens, offset) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logs, "finish_reason": finish}

    def _logs(self, tokens: list[Token], offset: int) -> Json:
        """`text_offset` counts the characters of the answer's own text, the prompt not among them."""
        names = [self._texts.text_of(token.id) for token in tokens]
        offsets = [offset]
        for name in names[:-1]:
            offsets.append(offsets[-1] + len(name))
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._texts.text_of(other): value for other, value in token.top} for token in tokens],
            "text_offset": offsets[: len(tokens)],
        }
