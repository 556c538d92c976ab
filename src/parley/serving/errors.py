"""Errors in the form of OpenAI's API, so that its clients raise the matching exception."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from parley.errors import ParleyError
from parley.inference.scheduler import Closed, QueueFull
from parley.text import one_line, shorten_middle

MAX_SHOWN = 160  # characters of a client's value that an error repeats
MAX_MESSAGE = 500
MAX_PARAM = 80

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An HTTP status and a body {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What a client sent may be in it: bounded, on one line, and encodable in UTF-8.
        super().__init__(status, shorten_middle(one_line(message, len(message) + 1), MAX_MESSAGE), headers)
        self.param, self.code = None if param is None else one_line(param, MAX_PARAM), code

    def body(self) -> dict[str, dict[str, str | None]]:
        error_type = (
            "server_error" if self.status_code >= 500 else _ERROR_TYPES.get(self.status_code, "invalid_request_error")
        )
        return {"error": {"message": self.detail, "type": error_type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, headers=self.headers)


def to_api_error(error: Exception, param: str | None = None) -> ApiError:
    """The response to an error raised below the server. `param`: the request field that caused it."""
    if isinstance(error, QueueFull):
        return too_many_requests(str(error))
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, ParleyError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, f"the decoder failed ({type(error.__cause__ or error).__name__}); see the server's log")


def too_many_requests(reason: str) -> ApiError:
    return ApiError(429, f"{reason}; try again shortly", code="queue_full", headers={"Retry-After": "1"})


def from_validation_error(error: ValidationError) -> ApiError:
    """The first problem of a request, in one line."""
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if not _is_type_name(part)]
    if not location:
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":  # from a model validator, whose messages begin with the field's name
            field, colon, _ = message.partition(":")
            return ApiError(400, message, param=field if colon else None)
        return ApiError(400, "the body must be a JSON object")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing; it is required", param=param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: no such field; leave it out or correct its name", param=param)
    message = first["msg"].removeprefix("Value error, ")
    wanted = message.removeprefix("Input should be ")
    expected = f"wanted {wanted}" if wanted != message else message[0].lower() + message[1:]
    return ApiError(400, f"{param}: got {_shown(first['input'])}; {expected}", param=param)


def _is_type_name(part: Any) -> bool:
    """pydantic adds union members and function validators to an error's location."""
    return isinstance(part, str) and ("[" in part or "(" in part or part in ("str", "int"))


def _shown(value: Any) -> str:
    """A client's value, bounded and on one line."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
