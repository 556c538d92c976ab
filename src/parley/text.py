"""Text from outside (names, rows, questions, answers) made safe for a terminal and short enough for one line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# What a terminal obeys instead of showing: C0 but tab and newline, DEL and C1 (ECMA-48); the bidirectional embeddings,
# overrides and isolates, which reorder what a reader sees (Trojan Source, CVE-2021-42574); and lone surrogates, which
# UTF-8 cannot hold, so that printing them raises UnicodeEncodeError.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with control characters, bidi controls and surrogates replaced by visible ones; the length is kept.

    C0 becomes its control picture (U+2400 to U+241F), DEL and C1 become U+2421, all others U+FFFD.
    """
    return _UNSAFE.sub(lambda match: _picture(match[0]), text)


def one_line(error: BaseException | str, limit: int = 240) -> str:
    """An error's text on one visible line, at most `limit` characters; the name of its type where it has no text."""
    text = visible(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shorten_middle(text: str, limit: int) -> str:
    """`text` in at most `limit` characters: a message names its subject first and its advice last, so both stay."""
    if len(text) <= limit:
        return text
    tail = (limit - 5) // 2
    return f"{text[: limit - 5 - tail]} ... {text[-tail:]}"


def print_text(console: Console, text: Any, style: str = "", *, wrap: bool = True) -> None:
    """Print `text` as it is: no markup, no emoji codes, no highlighting, no control characters."""
    from rich.text import Text  # imported late: `import parley` loads no rich

    console.print(Text(visible(str(text)), style), soft_wrap=not wrap)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code < 0xA0 else "\ufffd"
