from __future__ import annotations

import io
import pickle

import pytest
from rich.console import Console

from parley.errors import DataError, DeviceError, ParleyError, RunError, UsageError
from parley.text import one_line, print_text, shorten_middle, visible

OBEYED = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x7f", "\u202egnp.exe\u202c", "\u2066x\u2069", "\x00", "\ud83d"]


@pytest.mark.parametrize("text", OBEYED)
def test_no_character_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(text)
    assert all(c.isprintable() for c in shown)
    shown.encode("utf-8")


def test_letters_of_every_script_stay_as_they_are() -> None:
    text = "naïve\tمرحبا\nשלום 你好 🏴\u200d☠️ \u200f!"  # marks and joiners belong to words
    assert visible(text) == text


def test_pictures_name_the_control_character() -> None:
    assert visible("\x1b\x00\x7f\x85") == "␛␀␡␡"


@pytest.mark.parametrize("kind", [ParleyError, UsageError, DataError, DeviceError, RunError])
def test_every_error_is_one_short_visible_line(kind: type[ParleyError]) -> None:
    message = str(kind("first\n\tthen \x1b[31m" + "x" * 10_000 + " change it"))
    assert len(message) == 500
    assert message.startswith("first then ␛[31mxxx")
    assert message.endswith("xxx change it")
    assert str(pickle.loads(pickle.dumps(kind("short")))) == str(kind("short")) == "short"


def test_shortening_keeps_both_ends() -> None:
    assert shorten_middle("a" * 10 + "b" * 10, 15) == "aaaaa ... bbbbb"
    assert shorten_middle("short", 5) == "short"
    assert one_line("x" * 240) == "x" * 240
    assert len(one_line("x" * 241)) == 240
    assert one_line("x" * 300).endswith("...")
    assert one_line(KeyError()) == "KeyError"


def test_printing_keeps_brackets_and_emoji_codes() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=80)
    print_text(console, "runs/z[/z] [bold]x[/bold] :smile: \x1b[2J 12", wrap=False)
    assert file.getvalue() == "runs/z[/z] [bold]x[/bold] :smile: ␛[2J 12\n"
