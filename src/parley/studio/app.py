"""The application: middleware, pages, static files, and what becomes of errors."""

from __future__ import annotations

import asyncio
import gzip
import logging
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from parley.errors import ParleyError
from parley.studio.i18n import COOKIE, LANGUAGES
from parley.studio.pages import PAGES
from parley.studio.security import HEADERS, BodyTooLargeError, SecurityMiddleware
from parley.studio.state import Studio
from parley.studio.web import THEME_COOKIE, THEMES, fragment, page, read_form, said, translate

logger = logging.getLogger(__name__)

YEAR = 365 * 24 * 3600
QUEUE_SECONDS = 1.0  # between two looks at the queue
GZIP_FROM = 1024  # bytes


def create_app(studio: Studio, *, host: str = "127.0.0.1") -> FastAPI:
    """The studio's application; `host` is the address it is bound to."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch_queue(studio))
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        studio.close()

    app = FastAPI(title="Parley studio", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.studio = studio
    app.state.closing = asyncio.Event()  # set when the server ends, so that event streams do
    app.add_middleware(SecurityMiddleware, keys=studio.keys, host=host)
    app.add_exception_handler(ParleyError, _show_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(BodyTooLargeError, _show_too_large)
    app.add_exception_handler(Exception, _show_fault)
    for each in PAGES:
        app.include_router(each.router)
    app.add_api_route("/static/{name:path}", static_file, methods=["GET"], response_model=None)
    app.add_api_route("/preferences", set_preferences, methods=["POST"], response_model=None)
    return app


async def _watch_queue(studio: Studio) -> None:
    """Start what waits in the queue as devices become free. What hinders it is logged once, until it changes."""
    logged = ""
    while True:
        try:
            if await asyncio.to_thread(studio.queue.advance):
                studio.worker.close()  # it may hold memory of the GPU
            logged = ""
        except (ParleyError, OSError) as error:  # a full disk, say: the studio still shows the runs
            if str(error) != logged:
                logged = str(error)
                logger.error("%s", logged)
        await asyncio.sleep(QUEUE_SECONDS)


def static_file(name: str, request: Request) -> Response:
    if name not in _static_files():
        raise HTTPException(404)
    content, packed = _static_files()[name]
    headers = {"Cache-Control": f"private, max-age={YEAR}, immutable", "Vary": "Accept-Encoding"}
    if packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        content, headers["Content-Encoding"] = packed, "gzip"
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return Response(content, media_type=kind or "text/plain", headers=headers)


@cache
def _static_files() -> dict[str, tuple[bytes, bytes | None]]:
    """All files of static/, plain and compressed: a request names one of them, never a path."""
    found: dict[str, tuple[bytes, bytes | None]] = {}
    waiting = [(files("parley.studio").joinpath("static"), "")]
    while waiting:
        folder, prefix = waiting.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                waiting.append((entry, f"{prefix}{entry.name}/"))
            else:
                content = entry.read_bytes()
                found[prefix + entry.name] = content, gzip.compress(content) if len(content) > GZIP_FROM else None
    return found


async def set_preferences(request: Request) -> Response:
    """The language and the theme of this browser."""
    form = await read_form(request)
    response = Response(status_code=204, headers={"HX-Refresh": "true"})
    for cookie, field, allowed in ((COOKIE, "language", LANGUAGES), (THEME_COOKIE, "theme", THEMES)):
        if form.get(field) in allowed:
            response.set_cookie(cookie, form[field], max_age=YEAR, httponly=True, samesite="strict")
    return response


def _show_error(request: Request, error: Exception) -> Response:
    return _problem(request, 400, said(request, str(error)))


def _show_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    _ = translate(request)
    text = _("There is no such page.") if error.status_code == 404 else str(error.detail)
    return _problem(request, error.status_code, text)


def _show_too_large(request: Request, error: Exception) -> Response:
    _ = translate(request)
    return _problem(request, 413, _("That is too large."))


def _show_fault(request: Request, error: Exception) -> Response:
    """A fault of the studio's own, whose traceback is on the terminal. The middleware above is passed by then."""
    _ = translate(request)
    response = _problem(request, 500, _("That is a fault of the studio; its terminal says more."))
    response.headers.update(HEADERS)
    return response


def _problem(request: Request, status_code: int, text: str) -> Response:
    """What went wrong: for htmx a message, else a page of its own.

    It is shown in place of the part that was asked for, and after an action beside the page, which stays as it is.
    """
    if "hx-request" in request.headers:
        response = fragment(request, "_message.html", status_code, text=text)
        if request.method != "GET":
            response.headers["HX-Retarget"], response.headers["HX-Reswap"] = "#messages", "innerHTML"
        return response
    return page(request, "error.html", status_code, text=text)
