"""A rendered row for the eye: which of its text is learned, in the terminal and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from parley.data.render import Rendered
from parley.data.tokens import control_tokens
from parley.text import visible

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = "learned", "not learned", "control token"
_TRAINED, _PLAIN, _CONTROL = "bold black on pale_green3", "", "dim"
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Learned tokens</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
body {{ color-scheme: light dark; background: Canvas; color: CanvasText; }}
pre {{ font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
mark {{ background: #b7e4c0; color: #0b2e13; border-radius: 3px; }}
.control {{ opacity: 0.6; }}
</style>
<body>
<p class="legend"><mark>{0}</mark> · {1} · <span class="control">{2}</span></p>
<pre dir="auto">{body}</pre>
</body></html>
"""


@dataclass(frozen=True)
class Piece:
    """A run of decoded text that is learned as a whole or not at all; `control`: it is one control token."""

    text: str
    trained: bool
    control: bool = False


def pieces(tokenizer: Any, rendered: Rendered) -> list[Piece]:
    """`rendered` as runs of text. Joined, they are the decoded row.

    Ids are decoded by the run, for a character of several bytes may be split over tokens.
    """
    ids, special = rendered.input_ids, control_tokens(tokenizer).ids
    found: list[Piece] = []
    done, before = 0, ""
    for (trained, control), run in groupby(
        range(len(ids)), key=lambda at: (rendered.mask[at], at if ids[at] in special else None)
    ):
        run_ids = [ids[at] for at in run]
        done += len(run_ids)
        # Decoders drop a space where a text begins: a run is what it adds to the text so far.
        text = tokenizer.decode(ids[:done], clean_up_tokenization_spaces=False)
        own = text[len(before) :] if text.startswith(before) else tokenizer.decode(run_ids)
        found.append(Piece(own, trained, control is not None))
        before = text
    return found


def to_terminal(pieces: list[Piece]) -> Text:
    """Learned text on green, control tokens dimmed, and a legend line above."""
    from rich.text import Text

    text = Text.assemble((f" {LEGEND[0]} ", _TRAINED), f" {LEGEND[1]} ", (f" {LEGEND[2]}", _CONTROL), "\n\n")
    for piece in pieces:
        style = f"{_TRAINED if piece.trained else _PLAIN} {_CONTROL if piece.control else ''}".strip()
        text.append(visible(piece.text), style)
    return text


def to_html(pieces: list[Piece]) -> str:
    """A page of its own: learned text in <mark>, control tokens dimmed, and a legend line above."""
    body = ""
    for piece in pieces:
        shown = html.escape(visible(piece.text))
        shown = f'<span class="control">{shown}</span>' if piece.control else shown
        body += f"<mark>{shown}</mark>" if piece.trained else shown
    return _PAGE.format(*LEGEND, body=body)
