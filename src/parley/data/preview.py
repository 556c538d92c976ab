"""A rendered row shown as text: supervised tokens highlighted, in the terminal and as an HTML page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from parley.data.control_tokens import control_tokens
from parley.data.render import Rendered
from parley.text import visible

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = "supervised", "not supervised", "control token"
_SUPERVISED, _PLAIN, _CONTROL = "bold black on pale_green3", "", "dim"
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Supervised tokens</title>
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
    """A run of decoded text, all supervised or all not. `control`: it is a single control token."""

    text: str
    supervised: bool
    control: bool = False


def pieces(tokenizer: Any, rendered: Rendered) -> list[Piece]:
    """`rendered` as runs of text; concatenated, they are the decoded row.

    Runs are decoded rather than single ids, since the bytes of one character may be split over several tokens.
    """
    ids, special = rendered.input_ids, control_tokens(tokenizer).ids
    runs: list[Piece] = []
    before, start = 0, 0  # where the run before this one starts, and where this one does
    for (supervised, control), run in groupby(
        range(len(ids)), key=lambda i: (rendered.mask[i], i if ids[i] in special else None)
    ):
        end = start + sum(1 for _ in run)
        # Decoders strip a space at the beginning of a text, so a run is what it adds to the run before it.
        prefix = tokenizer.decode(ids[before:start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)
        added = text[len(prefix) :] if text.startswith(prefix) else tokenizer.decode(ids[start:end])
        runs.append(Piece(added, supervised, control is not None))
        before, start = start, end
    return runs


def to_terminal(pieces: list[Piece]) -> Text:
    """Supervised text on green, control tokens dimmed, below a line of legend."""
    from rich.text import Text

    text = Text.assemble((f" {LEGEND[0]} ", _SUPERVISED), f" {LEGEND[1]} ", (f" {LEGEND[2]}", _CONTROL), "\n\n")
    for piece in pieces:
        style = f"{_SUPERVISED if piece.supervised else _PLAIN} {_CONTROL if piece.control else ''}".strip()
        text.append(visible(piece.text), style)
    return text


def to_html(pieces: list[Piece]) -> str:
    """A self-contained page: supervised text in <mark>, control tokens dimmed, below a line of legend."""
    body = ""
    for piece in pieces:
        shown = html.escape(visible(piece.text))
        shown = f'<span class="control">{shown}</span>' if piece.control else shown
        body += f"<mark>{shown}</mark>" if piece.supervised else shown
    return _PAGE.format(*LEGEND, body=body)
