"""OpenAI's chat and completion requests, validated field by field.

Fields as in OpenAI's API reference (platform.openai.com/docs/api-reference); `top_k`, `min_p` and `repetition_penalty`
are vLLM's extensions under the same names. Unsupported fields are refused unless they have their neutral value, and so
are unknown fields, which are mostly misspelt.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from parley.config import GenerationSection

MAX_STOPS = 4
MAX_STOP_LENGTH = 256  # characters
MAX_TEMPLATE_SETTINGS = 4096  # characters of JSON
MAX_CHOICES = 16  # prompts times n, in one request
MAX_LOGPROBS = 20
MAX_FIELDS = 64  # of a request: each unknown one costs an error object
MIN_TEMPERATURE = 1e-3  # below it sampling is greedy: dividing logits by less would only overflow


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """Wrap a single prompt, a text or a list of ids, in a list."""
    is_single = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
    return [value] if is_single else value


def _check_functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in tools:
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('Input should be objects with "type": "function" and a "function" that has a "name"')
    return tools


def _check_template_settings(settings: dict[str, Any]) -> dict[str, Any]:
    # Each setting is compiled into the template.
    if len(json.dumps(settings)) > MAX_TEMPLATE_SETTINGS:
        raise ValueError(f"Input should be at most {MAX_TEMPLATE_SETTINGS} characters of JSON")
    return settings


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)]
# fail_fast: without it a body of a million wrong elements makes a million error objects, in 25 seconds.
Ids = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Count = Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
Prompts = Annotated[list[str], Count] | Annotated[list[Ids], Count]


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"got {len(data)} fields, wanted at most {MAX_FIELDS}")
        return data


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; this server writes none


class GenerationRequest(StrictModel):
    """Fields of chat and text completions alike."""

    model: str
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
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
    logit_bias: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> GenerationRequest:
        _refuse(self, frequency_penalty=(None, 0), presence_penalty=(None, 0), logit_bias=(None, {}))
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def token_limit(self) -> int | None:
        return self.max_tokens

    def generation_settings(self, defaults: GenerationSection) -> GenerationSection:
        """`defaults` with the fields that the request sets."""
        requested = {
            "max_new_tokens": self.token_limit(),
            "temperature": 0.0
            if self.temperature is not None and self.temperature < MIN_TEMPERATURE
            else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "seed": self.seed,
        }
        return defaults.model_copy(update={name: value for name, value in requested.items() if value is not None})


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Messages are parsed by the code that parses training data (parley.data.messages)."""

    messages: Objects = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[Objects, AfterValidator(_check_functions)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_check_template_settings)] | None = None
    modalities: Any = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        _refuse(self, response_format=(None, {"type": "text"}), modalities=(None, ["text"]))
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is text or token ids."""

    prompt: Annotated[Prompts, BeforeValidator(_as_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        _refuse(self, echo=(None, False), best_of=(None, self.num_choices), suffix=(None, ""))
        if len(self.prompt) * self.num_choices > MAX_CHOICES:
            raise ValueError(
                f"n: got {self.num_choices} choices for each of {len(self.prompt)} prompts, wanted at most "
                f"{MAX_CHOICES} in all; send fewer"
            )
        return self


Body = TypeVar("Body", bound=GenerationRequest)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Parse JSON; the parser refuses lone surrogates and nesting deeper than 200.

    Raises ValueError, which is pydantic's ValidationError for JSON that is no such request.
    """
    try:
        data = from_json(raw)
    except ValueError as error:
        hint = " (half a character, a lone surrogate)" if "hex escape" in str(error) else ""
        raise ValueError(f"the body is not valid JSON: {error}{hint}") from None
    return kind.model_validate(data)


def _refuse(request: GenerationRequest, **neutral: tuple[Any, ...]) -> None:
    for name, values in neutral.items():
        if dict(request)[name] not in values:
            raise ValueError(f"{name}: not supported by this server; leave it out")
