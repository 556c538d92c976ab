"""The routes: OpenAI's chat and text completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from parley.serving.errors import ApiError, of_validation
from parley.serving.metrics import Metrics
from parley.serving.middleware import Gone, Guard, Limits, unless_gone
from parley.serving.protocol import Asking, ChatRequest, CompletionRequest
from parley.serving.responses import ChatReply, CompletionReply, Reply
from parley.serving.service import Service
from parley.serving.streams import Answers


def create_app(service: Service, *, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The application; with `api_key`, every route but /health asks for it."""
    app = FastAPI(title="Parley", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=service.metrics)
    _tell_errors(app)
    _add_facts(app, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        service.uses_base(asked.model)
        started = perf_counter()
        prompt = await asyncio.to_thread(service.chat_prompt, asked)
        answers = service.submit([prompt], asked, asked.alternatives)
        reply = ChatReply(
            asked.model, asked.answers, len(prompt), service.texts, bool(asked.logprobs), tools=asked.offered
        )
        return await _replied(_Run(answers, reply, service.metrics, started), asked, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        service.uses_base(asked.model)
        started = perf_counter()
        prompts = await asyncio.to_thread(service.completion_prompts, asked)
        answers = service.submit(prompts, asked, asked.logprobs)
        count, tokens = len(prompts) * asked.answers, sum(map(len, prompts))
        reply = CompletionReply(asked.model, count, tokens, service.texts, asked.logprobs is not None)
        return await _replied(_Run(answers, reply, service.metrics, started), asked, request)

    return app


def _add_facts(app: FastAPI, service: Service) -> None:
    """The routes that only read."""

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "parley"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.served.names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.uses_base(name)
        return model(name)

    @app.get("/health")
    async def health() -> JSONResponse:
        error = service.scheduler.error
        status = "ok" if error is None else f"the decoder failed ({type(error).__name__}); restart the server"
        return JSONResponse({"status": status}, 200 if error is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _tell_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            where = f"{request.method} {request.url.path[:80]}"
            message = f"{where}: no such route" if error.status_code == 404 else f"{where}: {error.detail}"
            error = ApiError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nginx's number for it; nobody reads it but the metrics

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return ApiError(500, f"a fault of the server's own ({type(error).__name__}); see its log").response()


class _Run:
    """Answers on their way into a reply."""

    def __init__(self, answers: Answers, reply: Reply, metrics: Metrics, started: float) -> None:
        self.answers, self.reply = answers, reply
        self._metrics, self._started = metrics, started
        self._begun = False

    async def read(self) -> AsyncIterator[list[int]]:
        """Add what was written to the reply; to which of its answers."""
        async for chunks in self.answers:
            if not self._begun:
                self._metrics.first_token.observe(perf_counter() - self._started)
                self._begun = True
            for index, chunk in chunks:
                self.reply.add(index, chunk)
            yield list(dict.fromkeys(index for index, _ in chunks))

    async def read_all(self) -> None:
        async for _ in self.read():
            pass

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        for chunk in self.reply.opening():
            yield _event(chunk)
        try:
            async for indices in self.read():
                for index in indices:
                    for chunk in self.reply.chunks(index):
                        yield _event(chunk)
        except ApiError as error:  # the status was told long ago
            yield _event(error.body())
            return
        if include_usage:
            yield _event(self.reply.usage_chunk())
        yield "data: [DONE]\n\n"


async def _replied(run: _Run, asked: Asking, request: Request) -> Response:
    if asked.stream:
        return _EventStream(run, asked.include_usage)
    try:
        await unless_gone(request.receive, asyncio.create_task(run.read_all()))
    finally:
        run.answers.cancel()
    return JSONResponse(run.reply.whole())


class _EventStream(StreamingResponse):
    """Server-sent events, until the answers end or the client is gone; either way their slots are free then."""

    media_type = "text/event-stream"

    def __init__(self, run: _Run, include_usage: bool) -> None:
        super().__init__(run.events(include_usage), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, asyncio.create_task(self.stream_response(send)))
        except (Gone, TimeoutError, asyncio.CancelledError):  # the last when the server's own end waits no longer
            pass
        finally:
            self._run.answers.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
