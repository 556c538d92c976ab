"""Conversations filled into a layout against the same conversations rendered by themselves."""

from __future__ import annotations

import copy
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trl

from parley.data import render as rendering
from parley.data.control_tokens import control_tokens
from parley.data.encoding import MaskedText
from parley.data.render import render
from parley.data.supervision import RenderOptions
from parley.data.symbolic_template import SymbolicTemplate
from parley.data.symbolic_text import NotSymbolicError
from parley.data.text_layouts import TextLayouts, text_layouts
from parley.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import template_masks

TEMPLATES = sorted(Path(trl.__file__).parent.joinpath("chat_templates").glob("*.jinja"))
ROLES = [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"]]
WORDS = [
    "Ahoy",
    "é🏴",
    "\n",
    " ",
    "  ",
    "<think>",
    "</think>",
    "[",
    "{",
    '"',
    "assistant",
    "user",
    "0",
    "###",
    "\t",
    "<",
    ">",
]
LOOP = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>BODY<|eot_id|>{% endfor %}"


def contents(source: random.Random, count: int) -> list[str]:
    return ["".join(source.choices(WORDS, k=source.randint(1, 8))) for _ in range(count)]


def by_itself(tokenizer: Any, messages: list[dict[str, Any]], options: RenderOptions) -> MaskedText | None:
    try:
        return rendering._conversation(tokenizer, control_tokens(tokenizer), messages, None, options)
    except DataError:
        return None


def compare(tokenizer: Any, roles: list[str], options: RenderOptions, count: int, weight: float | None = None) -> int:
    """How many of `count` random conversations a layout filled; all of them as they are by themselves."""
    control = control_tokens(tokenizer)
    layouts = TextLayouts(tokenizer.get_chat_template(), tokenizer.special_tokens_map, control)
    render_placeholders = partial(rendering._conversation, tokenizer, control, tools=None, options=options)
    source, filled = random.Random(0), 0
    for _ in range(count):
        messages: list[dict[str, Any]] = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents(source, len(roles)), strict=True)
        ]
        if weight is not None:
            messages[-1]["weight"] = weight
        laid_out = layouts.masked_text(messages, 0, render_placeholders)
        if laid_out is not None:
            filled += 1
            wanted = by_itself(tokenizer, messages, options)
            assert wanted is not None
            assert (laid_out.text, laid_out.spans, laid_out.excluded) == (wanted.text, wanted.spans, wanted.excluded)
    return filled


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_layout_has_the_text_and_the_spans_of_a_rendering(path: Path) -> None:
    tokenizer = template_masks.tokenizer_for(path.read_text(encoding="utf-8"))
    for roles in ROLES:
        compare(tokenizer, roles, RenderOptions(), 8)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return copy.copy(tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        (RenderOptions(), None),
        (RenderOptions("last"), None),
        (RenderOptions("inputs"), 0.0),
        (RenderOptions(["user"]), 1.0),
        (RenderOptions(end_tokens="none"), None),
        (RenderOptions(end_tokens="last"), 0.0),
    ],
)
def test_layouts_under_all_options(tokenizer: Any, options: RenderOptions, weight: float | None) -> None:
    assert compare(tokenizer, ROLES[2], options, 30, weight) > 20


def test_most_rows_of_a_shape_are_filled_in(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    original = rendering.RenderedConversation

    def counted(*args: Any, **options: Any) -> Any:
        rendered.append(args)
        return original(*args, **options)

    monkeypatch.setattr(rendering, "RenderedConversation", counted)
    for number in range(50):
        render(tokenizer, [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "Ahoy"}])
    assert len(rendered) <= 2


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | length }}",
        "{{ m.content[0] }}",
        "{{ m.content | upper }}",
        "{{ m | tojson }}",
        "{{ m }}",
        "{{ 'a' ~ m ~ m.content }}",
        "{{ 'x' if m.content in 'Ahoy there' }}{{ m.content }}",
        "{{ 'x' if 'Ahoy there'.startswith(m.content) }}{{ m.content }}",
        "{{ 'x' if m.content.isdigit() }}{{ m.content }}",
        "{{ 'x' if m.content < 'b' }}{{ m.content }}",
        "{{ {'a': 1}.get(m.content, 2) }}{{ m.content }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ '%s' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{{ m.content ~ '' | length }}{{ (m.content ~ 'a') | length }}",
        "{{ strftime_now('%Y') }}{{ m.content }}",
        "{{ m.content.split() | join }}",
        "{{ m.content.join(['a', 'b']) }}",
        "{{ ['Ahoy', 'x'] | select('in', m.content) | list | length }}{{ m.content }}",
        "{{ 'y' if ('a' + m.content) == 'ab' }}{{ m.content }}",
    ],
)
def test_a_template_that_looks_into_contents_has_no_layout(tokenizer: Any, body: str) -> None:
    with pytest.raises(NotSymbolicError):
        SymbolicTemplate(LOOP.replace("BODY", body)).layout(["user", "assistant"])


@pytest.mark.parametrize(
    ("body", "plain", "seen"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "Ahoy", "a</think>b"),
        ("{% if '[' in m.content %}x{% endif %}{{ m.content }}", "Ahoy", "[b"),
        ("{% if m.content.startswith('/no') %}x{% endif %}{{ m.content }}", "Ahoy", "/no b"),
        ("{% if m.content == 'b' %}x{% endif %}{{ m.content }}", "Ahoy", "b"),
        ("{{ m.content.replace('b', 'c') }}", "Ahoy", "b"),
        ("{{ m.content.strip('b') or 'nothing' }}", "Ahoy", "bb"),
        ("{% if m.content %}{{ m.content | trim }}{% else %}x{% endif %}", " Ahoy ", "  "),
        ("{% if m.content in ['b', 'c'] %}x{% endif %}{{ m.content }}", "Ahoy", "c"),
    ],
)
def test_a_content_that_the_template_would_see_is_rendered_by_itself(body: str, plain: str, seen: str) -> None:
    layout = SymbolicTemplate(LOOP.replace("BODY", body)).layout(["user", "assistant"])
    assert layout.values([plain, plain]) is not None
    assert layout.values([plain, seen]) is None
    assert layout.values([seen, plain]) is None


def test_control_tokens_in_contents_are_rendered_by_themselves(tokenizer: Any) -> None:
    """Whole ones, and those that a content and the template make up together."""
    for content in ("a<|eot_id|>", "<|eot_id|"):
        rows = [
            [{"role": "user", "content": c}, {"role": "assistant", "content": "b"}] for c in ("q", "q", "q", content)
        ]
        tokenizer.chat_template = LOOP.replace("BODY", "{{ m.content }}>")
        first = [render(tokenizer, row) for row in rows][-1]
        assert first == rendering.encode(tokenizer, [by_itself(tokenizer, rows[-1], RenderOptions())])[0]
    assert text_layouts(tokenizer, control_tokens(tokenizer), RenderOptions()) is not None
