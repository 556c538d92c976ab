"""Every message of templates and code has a translation, and none is left over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po
from fastapi.testclient import TestClient

import parley.studio
from parley.studio.i18n import LANGUAGES, choose_language

PACKAGE = Path(parley.studio.__file__).parent
METHODS = [("**.py", "python"), ("**.html", "jinja2")]
OPTIONS = {"**.html": {"newstyle_gettext": "true", "trimmed": "false"}}
KEYWORDS = {"_": None, "N_": None, "gettext": None, "ngettext": (1, 2)}
PLACEHOLDER = re.compile(r"%\(\w+\)[sd]")


def extracted() -> set[str]:
    found = extract_from_dir(PACKAGE, METHODS, OPTIONS, keywords=KEYWORDS)
    return {message if isinstance(message, str) else message[0] for _, _, message, *_ in found}


@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {"en"}))
def test_every_message_is_translated(language: str) -> None:
    translated: dict[str, str] = {}
    for path in sorted((PACKAGE / "locale" / language).glob("*.po")):
        with path.open("rb") as file:
            for message in read_po(file):
                if message.id:
                    key = message.id if isinstance(message.id, str) else message.id[0]
                    text = message.string if isinstance(message.string, str) else " ".join(message.string)
                    assert text, f"{path.name}: {key!r} has no translation"
                    assert translated.setdefault(key, text) == text, f"{path.name}: {key!r} is translated twice"
                    assert set(PLACEHOLDER.findall(text)) == set(PLACEHOLDER.findall(str(message.id))), key
    messages = extracted()
    assert sorted(messages - set(translated)) == []
    assert sorted(set(translated) - messages) == []


def test_a_page_is_in_the_language_that_is_asked_for(client: TestClient) -> None:
    assert "No runs yet." in client.get("/").text
    assert "还没有运行" in client.get("/", headers={"Accept-Language": "zh-CN,zh;q=0.9"}).text
    assert client.post("/preferences", data={"language": "zh"}).headers["hx-refresh"] == "true"
    text = client.get("/").text
    assert "还没有运行" in text
    assert '<html lang="zh"' in text


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [(None, None, "en"), ("zh", "en", "zh"), ("xx", "zh-TW", "zh"), (None, "fr, zh;q=0.5", "zh"), (None, "fr", "en")],
)
def test_the_language_is_chosen(cookie: str | None, accepted: str | None, language: str) -> None:
    assert choose_language(cookie, accepted) == language
