"""What clients may ask: OpenAI's chat and completion requests, checked field by field.

Fields as in OpenAI's API reference (platform.openai.com/docs/api-reference); `top_k`, `min_p` and `repetition_penalty`
are the extensions that other servers have under the same names. What this server cannot do is refused, not ignored,
unless it is asked for in its neutral value. Unknown fields are refused too: they are mostly misspelt.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from parley.config import GenerationSection

MOST_STOPS = 4
LONGEST_STOP = 256  # characters
MOST_ANSWERS = 16  # prompts times n, in one request
MOST_LOGPROBS = 20
COLDEST = 1e-3  # temperatures below are greedy: dividing by them would only overflow


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """One prompt as a list of one; a list of ids is one prompt."""
    one = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
    return [value] if one else value


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in tools:
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('Input should be objects with "type": "function" and a "function" that has a "name"')
    return tools


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=MOST_STOPS), BeforeValidator(_as_list)]
Prompts = Annotated[list[str] | list[list[int]], Field(min_length=1, max_length=MOST_ANSWERS)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; none is written


class Asking(Strict):
    """What both kinds of request have."""

    model: str
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _only_what_can_be_done(self) -> Asking:
        _refuse(self, frequency_penalty=(None, 0), presence_penalty=(None, 0), logit_bias=(None, {}))
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def most_tokens(self) -> int | None:
        return self.max_tokens

    def settings(self, defaults: GenerationSection) -> GenerationSection:
        """The server's settings with what was asked for in their place."""
        asked = {
            "max_new_tokens": self.most_tokens(),
            "temperature": 0.0 if self.temperature is not None and self.temperature < COLDEST else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "seed": self.seed,
        }
        return defaults.model_copy(update={name: value for name, value in asked.items() if value is not None})


class ChatRequest(Asking):
    """POST /v1/chat/completions. Messages are read as training data is (parley.data.messages)."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[dict[str, Any]], AfterValidator(_functions)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None

    @model_validator(mode="after")
    def _only_chat(self) -> ChatRequest:
        _refuse(self, response_format=(None, {"type": "text"}), modalities=(None, ["text"]))
        for name, value in (("messages", self.messages), ("tools", self.tools)):
            if not _readable(value):
                raise ValueError(f"{name}: holds half a character (a lone surrogate); repair the text")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self

    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Asking):
    """POST /v1/completions. A prompt is text, encoded with the tokenizer's beginning-of-text token, or ids."""

    prompt: Annotated[Prompts, BeforeValidator(_as_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _only_completions(self) -> CompletionRequest:
        _refuse(self, echo=(None, False), best_of=(None, self.answers), suffix=(None, ""))
        if len(self.prompt) * self.answers > MOST_ANSWERS:
            raise ValueError(
                f"n: got {self.answers} answers to each of {len(self.prompt)} prompts, wanted at most {MOST_ANSWERS} "
                "answers in all; send fewer"
            )
        return self


def _readable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(request: Asking, **neutral: tuple[Any, ...]) -> None:
    for name, values in neutral.items():
        if dict(request)[name] not in values:
            raise ValueError(f"{name}: not supported by this server; leave it out")
