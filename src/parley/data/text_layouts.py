"""Conversations of one shape share a layout: rendered once, then filled in.

The shape is what a conversation has besides its contents: roles and loss weights. Where the template looks into no
content (parley.data.symbolic_template), the text around the contents and the supervised spans are the same for all
conversations of a shape, which makes rendering one about ten times cheaper. Everything else is rendered by itself, as
is a content with a control token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from parley.data.control_tokens import ControlTokens
from parley.data.conversation_text import TEMPLATE_ERRORS, is_stock, template_of
from parley.data.encoding import MaskedText
from parley.data.example import WEIGHT, Message
from parley.data.supervision import RenderOptions
from parley.data.symbolic_template import SymbolicTemplate, TextLayout
from parley.data.symbolic_text import NotSymbolicError, placeholder
from parley.data.text_regions import Span
from parley.errors import DataError, ModelError

_MAX_SHAPES = 1024
_ATTEMPTS = 8
"""Shapes tried before a template is taken to have no layouts."""
_PLAIN = {("role", "content"), ("role", "content", WEIGHT)}
"""The fields of a message that a layout can have, in their order."""

Shape = tuple[Any, ...]
RenderPlaceholders = Callable[[list[Message]], MaskedText]


@dataclass(frozen=True)
class _Edge:
    """A character position: so many fields before it, and the characters of the template's own text before it."""

    fields: int
    literal: int

    def at(self, ends: Sequence[int]) -> int:
        """The position where the values of the first n fields have ends[n] characters."""
        return self.literal + ends[self.fields]


@dataclass(frozen=True)
class _MaskedLayout:
    """A TextLayout with its supervised spans. `rendered`: of the placeholders. control_tokens: how many it has."""

    layout: TextLayout
    rendered: MaskedText
    spans: list[tuple[_Edge, _Edge]]
    excluded: list[tuple[_Edge, _Edge]]
    weighted: list[tuple[_Edge, _Edge, float]]
    control_tokens: int

    def filled(self, contents: Sequence[str], control: ControlTokens) -> MaskedText | None:
        values = self.layout.values(contents)
        if values is None:
            return None
        text = self.layout.text(values)
        # One more is in a content, or made up of a content and the text around it.
        if len(control.pattern.findall(text)) != self.control_tokens:
            return None
        ends = list(accumulate(map(len, values), initial=0))
        return replace(
            self.rendered,
            text=text,
            spans=[(start.at(ends), end.at(ends)) for start, end in self.spans],
            excluded=[(start.at(ends), end.at(ends)) for start, end in self.excluded],
            weighted=[(start.at(ends), end.at(ends), weight) for start, end, weight in self.weighted],
        )


class TextLayouts:
    """The layouts of one chat template, special tokens and render options, by shape."""

    def __init__(self, source: str, special_tokens: dict[str, str], control: ControlTokens) -> None:
        self.source, self.special_tokens, self.control = source, special_tokens, control
        self._template: SymbolicTemplate | None = None
        self._layouts: dict[Shape, _MaskedLayout | None] = {}
        self._seen: set[Shape] = set()

    def masked_text(self, messages: list[Message], first: int, render: RenderPlaceholders) -> MaskedText | None:
        """The text of a conversation that is supervised from message `first` on; None where it needs a rendering of
        its own. `render` renders placeholders in place of the contents."""
        shape = _shape_of(messages, first)
        if shape is None:
            return None
        if shape not in self._layouts:
            # A layout costs as much as several renderings: only a shape that comes again gets one.
            if shape not in self._seen:
                self._seen.add(shape)
                return None
            self._add(shape, messages, render)
        layout = self._layouts[shape]
        return layout.filled([message["content"] for message in messages], self.control) if layout else None

    def _add(self, shape: Shape, messages: list[Message], render: RenderPlaceholders) -> None:
        if len(self._layouts) >= _MAX_SHAPES:
            self._layouts.clear()
        hopeless = len(self._layouts) >= _ATTEMPTS and not any(self._layouts.values())
        self._layouts[shape] = None if hopeless else self._layout(messages, render)

    def _layout(self, messages: list[Message], render: RenderPlaceholders) -> _MaskedLayout | None:
        try:
            self._template = self._template or SymbolicTemplate(self.source)
            layout = self._template.layout([message["role"] for message in messages], **self.special_tokens)
            rendered = render([message | {"content": placeholder(at)} for at, message in enumerate(messages)])
        # What a template refuses, its own rendering reports.
        except (NotSymbolicError, DataError, *TEMPLATE_ERRORS):
            return None
        values = [placeholder(field.message) for field in layout.fields]
        if rendered.text != layout.text(values) or rendered.plain:
            return None
        fields = _field_spans(layout)
        edges = [
            [_edges(span, fields) for span in group]
            for group in (rendered.spans, rendered.excluded, [(start, end) for start, end, _ in rendered.weighted])
        ]
        if any(None in group for group in edges):
            return None
        spans, excluded, weighted = ([edge for edge in group if edge] for group in edges)
        weights = [(*edge, weight) for edge, (_, _, weight) in zip(weighted, rendered.weighted, strict=True)]
        count = len(self.control.pattern.findall(rendered.text))
        return _MaskedLayout(layout, rendered, spans, excluded, weights, count)


def _shape_of(messages: list[Message], first: int) -> Shape | None:
    shape: list[Any] = [first]
    for message in messages:
        if tuple(message) not in _PLAIN or type(message["content"]) is not str:
            return None
        shape += message["role"], message.get(WEIGHT)
    return tuple(shape)


def _field_spans(layout: TextLayout) -> list[Span]:
    spans: list[Span] = []
    at = 0
    for field in layout.fields:
        at += len(field.before)
        spans.append((at, at + len(placeholder(field.message))))
        at = spans[-1][1]
    return spans


def _edges(span: Span, fields: list[Span]) -> tuple[_Edge, _Edge] | None:
    start, end = _edge(span[0], fields), _edge(span[1], fields)
    return (start, end) if start and end else None


def _edge(character: int, fields: list[Span]) -> _Edge | None:
    """A position in the text of the placeholders, None inside of one."""
    before = bisect_right([end for _, end in fields], character)
    if before < len(fields) and fields[before][0] < character:
        return None
    return _Edge(before, character - sum(end - start for start, end in fields[:before]))


def text_layouts(tokenizer: Any, control: ControlTokens, options: RenderOptions) -> TextLayouts | None:
    """The layouts of a tokenizer's chat template; None where it has none, or renders in a way of its own."""
    if not is_stock(tokenizer):
        return None
    try:
        source = template_of(tokenizer, None).source
    except (ModelError, ValueError):  # rendering reports it
        return None
    train_on = tuple(options.train_on) if isinstance(options.train_on, list) else options.train_on
    key = (train_on, options.end_tokens, options.control_tokens)
    return _text_layouts(source, tuple(tokenizer.special_tokens_map.items()), control, key)


@lru_cache(maxsize=8)
def _text_layouts(
    source: str, special_tokens: tuple[tuple[str, str], ...], control: ControlTokens, options: tuple[Any, ...]
) -> TextLayouts:
    return TextLayouts(source, dict(special_tokens), control)
