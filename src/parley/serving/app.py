"""The routes: OpenAI's chat and text completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from parley.serving.errors import ApiError, from_validation_error
from parley.serving.limits import Limits
from parley.serving.metrics import Metrics
from parley.serving.middleware import CLOSE, AdmissionMiddleware, run_until_disconnect
from parley.serving.output_stream import OutputStream
from parley.serving.protocol import Body, ChatRequest, CompletionRequest, GenerationRequest, parse_body
from parley.serving.responses import ChatResponse, CompletionResponse, GenerationResponse
from parley.serving.service import Service


def create_app(service: Service, *, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The application; with `api_key`, every route but /health requires it."""
    # No documentation pages: they load scripts from a CDN, and a browser cannot send the API key.
    app = FastAPI(title="Parley", docs_url=None, redoc_url=None)
    app.add_middleware(AdmissionMiddleware, api_key=api_key, limits=limits, metrics=service.metrics)
    _add_error_handlers(app)
    _add_read_routes(app, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        started = perf_counter()
        body = await _parse_body(ChatRequest, request, service)
        prompt = await service.run(service.chat_prompt, body)
        outputs = service.submit([prompt], body, body.num_top_logprobs)
        response = ChatResponse(
            body.model, body.num_choices, len(prompt), service.texts, bool(body.logprobs), tools=body.offered_tools
        )
        return await _respond(_Generation(outputs, response, service.metrics, started), body, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        started = perf_counter()
        body = await _parse_body(CompletionRequest, request, service)
        prompts = await service.run(service.completion_prompts, body)
        outputs = service.submit(prompts, body, body.logprobs)
        num_choices, prompt_tokens = len(prompts) * body.num_choices, sum(map(len, prompts))
        response = CompletionResponse(body.model, num_choices, prompt_tokens, service.texts, body.logprobs is not None)
        return await _respond(_Generation(outputs, response, service.metrics, started), body, request)

    return app


async def _parse_body(kind: type[Body], request: Request, service: Service) -> Body:
    """The request's JSON body, parsed off the event loop.

    Only JSON by its own name: a web page may make a browser post text to this machine without asking, but not JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(400, "the body must be JSON, sent with Content-Type: application/json", headers=CLOSE)
    try:
        body = await service.run(parse_body, kind, await request.body())
    except ValidationError as error:
        raise from_validation_error(error) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    service.uses_base(body.model)
    return body


def _add_read_routes(app: FastAPI, service: Service) -> None:
    def model_object(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "parley"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name) for name in service.model.names]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        service.uses_base(name)
        return model_object(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        error = service.scheduler.error
        status = "ok" if error is None else f"the decoder failed ({type(error).__name__}); restart the server"
        return JSONResponse({"status": status}, 200 if error is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is answered in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            route = f"{request.method} {request.url.path[:80]}"
            message = f"{route}: no such route" if error.status_code == 404 else f"{route}: {error.detail}"
            error = ApiError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nginx's number for it; only the metrics see it

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal server error ({type(error).__name__}); see the server's log").response()


class _Generation:
    """One request's outputs on their way into its response."""

    def __init__(self, outputs: OutputStream, response: GenerationResponse, metrics: Metrics, started: float) -> None:
        self.outputs, self.response = outputs, response
        self._metrics, self._started = metrics, started
        self._has_first_token = False

    async def updates(self) -> AsyncIterator[list[int]]:
        """Add outputs to the response as they come; yields the indices of the choices that grew."""
        async for chunks in self.outputs:
            if not self._has_first_token:
                self._metrics.first_token.observe(perf_counter() - self._started)
                self._has_first_token = True
            for index, chunk in chunks:
                self.response.add(index, chunk)
            # Each choice once, in order: several chunks of it may arrive together.
            yield list(dict.fromkeys(index for index, _ in chunks))

    async def finish(self) -> None:
        async for _ in self.updates():
            pass

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        for chunk in self.response.first_chunks():
            yield _event(chunk)
        try:
            async for indices in self.updates():
                for index in indices:
                    for chunk in self.response.new_chunks(index):
                        yield _event(chunk)
        except ApiError as error:  # the status line is already sent, so the error is an event
            yield _event(error.body())
            return
        if include_usage:
            yield _event(self.response.usage_chunk())
        # OpenAI's clients read a stream up to this line, which is not JSON.
        yield "data: [DONE]\n\n"


async def _respond(generation: _Generation, body: GenerationRequest, request: Request) -> Response:
    if body.stream:
        return _EventStream(generation, body.include_usage)
    try:
        await run_until_disconnect(request.receive, asyncio.create_task(generation.finish()))
    finally:
        generation.outputs.cancel()
    return JSONResponse(generation.response.body())


class _EventStream(StreamingResponse):
    """Server-sent events until the outputs end or the client is gone; both free the slots."""

    media_type = "text/event-stream"

    def __init__(self, generation: _Generation, include_usage: bool) -> None:
        # X-Accel-Buffering: nginx would hold the events back otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(generation.events(include_usage), headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_until_disconnect(receive, asyncio.create_task(self.stream_response(send)))
        except (ClientDisconnect, TimeoutError, asyncio.CancelledError):  # CancelledError: the server's own shutdown
            pass
        finally:
            self._generation.outputs.cancel()


def _event(data: dict[str, Any]) -> str:
    # One line: an empty line ends a server-sent event.
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
