"""What pages share: the templates in both languages, forms, and the studio of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from math import exp
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from parley.errors import UsageError
from parley.studio.i18n import COOKIE, LANGUAGES, N_, choose_language, translations, translator
from parley.studio.messages import translated
from parley.studio.state import Studio
from parley.text import visible
from parley.training.formatting import duration
from parley.units import file_size, short_count

__all__ = ["N_", "StudioDep", "fragment", "language_of", "page", "read_form", "said", "translate"]

THEME_COOKIE = "parley_theme"
THEMES = ("auto", "light", "dark")
MAX_FIELDS = 1000


def get_studio(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


StudioDep = Annotated[Studio, Depends(get_studio)]


def language_of(request: Request) -> str:
    return choose_language(request.cookies.get(COOKIE), request.headers.get("accept-language"))


def theme_of(request: Request) -> str:
    chosen = request.cookies.get(THEME_COOKIE)
    return chosen if chosen in THEMES else "auto"


def said(request: Request, text: str) -> str:
    """A command's message in the language of the request."""
    return translated(translator(language_of(request)), text)


def translate(request: Request) -> Callable[[str], str]:
    """Messages in the language of the request."""
    return translator(language_of(request))


def page(request: Request, template: str, status_code: int = 200, **context: Any) -> HTMLResponse:
    """A page of `template`, which extends base.html."""
    from parley.studio.pages import PAGES

    shared = {
        "pages": PAGES,
        "path": request.url.path,
        "theme": theme_of(request),
        "themes": THEMES,
        "languages": LANGUAGES,
        "csrf": get_studio(request).keys.csrf,
    }
    return fragment(request, template, status_code, **shared, **context)


def fragment(request: Request, template: str, status_code: int = 200, **context: Any) -> HTMLResponse:
    """A part of a page, for htmx."""
    language = language_of(request)
    text = _environment(language).get_template(template).render(language=language, **context)
    return HTMLResponse(text, status_code)


def render(language: str, template: str, **context: Any) -> str:
    return _environment(language).get_template(template).render(language=language, **context)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a URL-encoded form; of a name that comes twice, the last. Raises UsageError.

    FastAPI's own forms need python-multipart; files are uploaded as bodies instead.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if body and kind != "application/x-www-form-urlencoded":
        raise UsageError(f"got a body of type {kind or 'none'}, wanted a form")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError:
        raise UsageError("the form is not what a page of the studio sends; reload the page") from None


def static(name: str) -> str:
    """The URL of a file in static/, which changes with the file: browsers may keep it for good."""
    return f"/static/{name}?v={_version(name)}"


@cache
def _version(name: str) -> str:
    return hashlib.sha256(files("parley.studio").joinpath("static", name).read_bytes()).hexdigest()[:12]


@cache
def _environment(language: str) -> Environment:
    environment = Environment(
        loader=PackageLoader("parley.studio"),
        autoescape=True,  # names, rows and answers come from outside
        undefined=StrictUndefined,
        finalize=shown,
        extensions=["jinja2.ext.i18n"],
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.install_gettext_translations(translations(language))  # type: ignore[attr-defined]
    environment.globals["_"] = partial(message, translations(language).gettext)
    environment.globals["static"] = static
    environment.filters["said"] = partial(translated, translations(language).gettext)
    environment.filters |= {
        "url": lambda value: quote(str(value), safe="/"),
        "count": short_count,
        "size": file_size,
        "figure": figure,
        "duration": duration,
        "probability": lambda logprob: f"{100 * exp(logprob):.0f}%",
        "thousands": lambda value: f"{value:,.0f}",
    }
    return environment


def message(gettext: Callable[[str], str], text: str, **values: Any) -> str:
    """`_` of templates. Jinja's own calls every translation safe, and what it is given may be a role of a data set."""
    translated = gettext(text)
    return translated % values if values else translated


def shown(value: Any) -> Any:
    """What a template writes: without control characters and bidi overrides, wherever it came from."""
    if isinstance(value, Markup):  # what was escaped already
        return Markup(visible(value))
    return visible(value) if isinstance(value, str) else value


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
