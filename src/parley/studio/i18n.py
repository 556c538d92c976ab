"""Chinese and English: gettext catalogues (`locale/LANGUAGE/*.po`), read by Babel without compiled files.

English is what the code says, so that it needs no catalogue.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from gettext import GNUTranslations, NullTranslations
from importlib.resources import files

from babel.core import negotiate_locale
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po

LANGUAGES = {"en": "English", "zh": "中文"}
COOKIE = "parley_language"


def N_(text: str) -> str:
    """Marks `text` as a message; it is translated where it is shown."""
    return text


@cache
def translations(language: str) -> NullTranslations:
    """The messages of all pages in `language`."""
    folder = files("parley.studio").joinpath("locale", language)
    if language == "en" or not folder.is_dir():
        return NullTranslations()
    merged = Catalog(locale=language)
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".po"):
            for message in read_po(io.BytesIO(entry.read_bytes()), locale=language):
                if message.id and message.string:
                    merged.add(message.id, message.string)
    compiled = io.BytesIO()
    write_mo(compiled, merged)
    compiled.seek(0)
    return GNUTranslations(compiled)


def choose_language(cookie: str | None, accepted: str | None) -> str:
    """The language of the cookie, or the first of an Accept-Language header that there is."""
    if cookie in LANGUAGES:
        return cookie
    names = [part.partition(";")[0].strip().partition("-")[0] for part in (accepted or "").split(",")]
    return negotiate_locale(names, list(LANGUAGES)) or "en"


def translator(language: str) -> Callable[[str], str]:
    return translations(language).gettext
