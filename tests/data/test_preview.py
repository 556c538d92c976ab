from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from parley.data.preview import Piece, pieces, to_html, to_terminal
from parley.data.render import Rendered, render

MESSAGES = [
    {"role": "user", "content": "Which flag, <b>mate</b>?"},
    {"role": "assistant", "content": "🏴\u200d☠️ & naïve 日本"},
]


def test_pieces_are_runs_of_the_decoded_row(tiny_tokenizer: Any) -> None:
    rendered = render(tiny_tokenizer, MESSAGES)
    found = pieces(tiny_tokenizer, rendered)
    assert "".join(piece.text for piece in found) == tiny_tokenizer.decode(rendered.input_ids)
    assert found[0] == Piece("<|begin_of_text|>", supervised=False, control=True)
    assert found[-2:] == [
        Piece("🏴\u200d☠️ & naïve 日本", supervised=True),
        Piece("<|eot_id|>", supervised=True, control=True),
    ]
    assert all(piece.supervised is False for piece in found[:-2])
    # The flag takes several tokens, none of which is a character of its own.
    assert "\ufffd" in tiny_tokenizer.decode(rendered.input_ids[-3:-1]) or len(rendered.input_ids) > len(found)


def test_neighbouring_control_tokens_are_pieces_of_their_own(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.eos_token_id
    found = pieces(tiny_tokenizer, Rendered([end, end, end], [False, True, True]))
    assert [(piece.text, piece.supervised) for piece in found] == [("<|eot_id|>", False)] + [("<|eot_id|>", True)] * 2
    assert pieces(tiny_tokenizer, Rendered([], [])) == []


def test_a_run_keeps_the_space_it_begins_with() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁Hello": 0, "▁world": 1}, unk_token="▁Hello"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    found = pieces(tokenizer, Rendered([0, 1], [False, True]))
    assert [piece.text for piece in found] == ["Hello", " world"]


def test_the_terminal_colours_supervised_text(tiny_tokenizer: Any) -> None:
    text = to_terminal(pieces(tiny_tokenizer, render(tiny_tokenizer, MESSAGES)))
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == [" supervised ", "🏴\u200d☠️ & naïve 日本", "<|eot_id|>"]
    dimmed = [text.plain[span.start : span.end] for span in text.spans if "dim" in str(span.style)]
    assert "<|begin_of_text|>" in dimmed
    assert "<|eot_id|>" in dimmed
    console = Console(force_terminal=True, width=80, color_system="truecolor", record=True, quiet=True)
    console.print(text)  # every style is one that rich knows
    assert "[b]" in to_terminal([Piece("[b]", False)]).plain


def test_no_control_character_reaches_the_terminal() -> None:
    shown = to_terminal([Piece("\x1b[31mred\x07\r\n\ttab\x9b\x7f", True)]).plain
    assert shown.endswith("␛[31mred␇␍\n\ttab␡␡")


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marked, self.tags, self.body = "", set[str](), ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.body += data if "pre" in self.open else ""
        self.marked += data if "mark" in self.open and "pre" in self.open else ""


def test_the_page_marks_what_is_learned_and_escapes_the_rest(tiny_tokenizer: Any) -> None:
    found = pieces(tiny_tokenizer, render(tiny_tokenizer, MESSAGES))
    reader = Reader()
    page = to_html(found)
    reader.feed(page)
    assert reader.body == "".join(piece.text for piece in found)
    assert reader.marked == "🏴\u200d☠️ & naïve 日本<|eot_id|>"
    assert "b" not in reader.tags
    assert page.startswith("<!doctype html>")
    assert 'class="legend"' in page
    assert "http" not in page


def test_decoding_is_linear_in_the_length_of_the_row(tiny_tokenizer: Any, monkeypatch: Any) -> None:
    decoded = 0
    decode = tiny_tokenizer.decode

    def counted(ids: list[int], **options: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, **options)

    monkeypatch.setattr(tiny_tokenizer, "decode", counted)
    end = tiny_tokenizer.eos_token_id
    pieces(tiny_tokenizer, Rendered([end] * 1000, [False] * 1000))
    assert decoded < 4000
