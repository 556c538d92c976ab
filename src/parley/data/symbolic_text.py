"""Strings that stand for any text: symbolic execution of a chat template.

A template that never looks into what a message says writes the same text around every content. Whether it looks is
found by running it over placeholders (King, "Symbolic Execution and Program Testing", 1976). A SymbolicText can be
stripped, joined to other text and written. Tests for a constant are answered with no, and noted: the result holds for
contents that do not have the constant (`Guards.absent`). Any other operation raises NotSymbolicError, so that the
conversations of that template are rendered one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Never

from parley.data.traced_text import Run, Source, TracedText, runs_of

# Letters alone: JSON and repr leave them as they are, so that a text that has lost its origin is found.
_PLACEHOLDER = "ParleyPlaceholder"


class NotSymbolicError(Exception):
    """The template looks into a text in a way that has no one answer for all texts."""


Strip = tuple[Callable[[str, str | None], str], str | None]
"""str.strip, str.lstrip or str.rstrip, and its characters."""
Strips = tuple[Strip, ...]


@dataclass
class Guards:
    """What a content has to fulfil for the result to hold.

    absent: constants that it does not have. nonempty: by message, what must be left after these strips.
    """

    absent: set[str] = field(default_factory=set)
    nonempty: set[tuple[int, Strips]] = field(default_factory=set)
    failed: bool = False
    """NotSymbolicError was raised; Jinja's own tests may have caught it."""

    def fail(self) -> Never:
        self.failed = True
        raise NotSymbolicError


@dataclass(frozen=True, eq=False, slots=True)
class Symbol(Source):
    """The content of a message after `strips`."""

    guards: Guards
    strips: Strips = ()

    def stripped(self, strip: Strip) -> Symbol:
        strips = (*self.strips, strip)
        self.guards.nonempty.add((self.message, strips))
        return Symbol(self.message, self.field, self.guards, strips)


def placeholder(message: int) -> str:
    """A text for the content of a message."""
    return f"{_PLACEHOLDER}{message}z"


def has_placeholder(text: str) -> bool:
    return str.__contains__(text, _PLACEHOLDER)


class SymbolicText(TracedText):
    """A placeholder, or text with placeholders in it. What is not defined here fails, see the end of this module."""

    __slots__ = ()

    @classmethod
    def content(cls, message: int, guards: Guards) -> SymbolicText:
        text = placeholder(message)
        traced = cls._with(text, ((len(text), Symbol(message, "content", guards), 0, None),))
        assert isinstance(traced, SymbolicText)
        return traced

    @property
    def guards(self) -> Guards:
        return next(symbol.guards for symbol in symbols(self))

    def __bool__(self) -> bool:
        return True  # what is empty is rendered by itself

    def __radd__(self, other: str) -> str:
        # Python prefers the reflected method of a subclass only where the subclass defines it itself.
        return TracedText.__radd__(self, other)

    def __eq__(self, other: object) -> bool:
        if other is self:
            return True
        # An empty string differs from every content: none is empty.
        return isinstance(other, str) and other != "" and self._has(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, part: Any) -> bool:
        return self._has(part)

    def _has(self, constant: Any) -> bool:
        """Whether the text has a constant: no, on the condition that it has not."""
        # Text around a content could make up a part of the constant.
        if type(constant) is not str or not constant or len(self._runs) != 1:
            self.guards.fail()
        self.guards.absent.add(constant)
        return False

    def startswith(self, prefix: Any, /, *edges: Any) -> bool:
        constants = prefix if isinstance(prefix, tuple) else (prefix,)
        return self.guards.fail() if edges else any([self._has(constant) for constant in constants])

    endswith = startswith

    def split(self, sep: Any = None, maxsplit: Any = -1) -> list[str]:
        self._has(sep)
        return [self]

    rsplit = split

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        self._has(sep)
        return self, "", ""

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        self._has(sep)
        return "", "", self

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        self._has(old)
        return self

    def removeprefix(self, prefix: str, /) -> str:
        self._has(prefix)
        return self

    removesuffix = removeprefix

    def find(self, part: Any, /, *edges: Any) -> int:
        self._has(part)
        return -1

    rfind = find

    def count(self, part: Any, /, *edges: Any) -> int:
        self._has(part)
        return 0

    def strip(self, chars: str | None = None, /) -> str:
        if len(self._runs) != 1:
            return self.lstrip(chars).rstrip(chars)
        return self._strip_edge(0, str.strip, chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._strip_edge(0, str.lstrip, chars)

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._strip_edge(-1, str.rstrip, chars)

    def _strip_edge(self, edge: int, method: Callable[[str, str | None], str], chars: str | None) -> str:
        """Strip the text before the first placeholder (or after the last), and the placeholder where that is blank."""
        if chars is not None and type(chars) is not str:
            self.guards.fail()
        pieces = list(_pieces(self))
        while pieces:
            text, (_, source, start, message) = pieces.pop(edge)
            if isinstance(source, Symbol):
                source = source.stripped((method, chars))
            else:
                text = method(text, chars)
            if text:
                pieces.insert(len(pieces) if edge else 0, (text, (len(text), source, start, message)))
                break
        return self._with("".join(text for text, _ in pieces), tuple(run for _, run in pieces))


def _pieces(text: str) -> Iterator[tuple[str, Run]]:
    """The runs of a text, each with its part of the text."""
    plain, at = str.__str__(text), 0
    for run in runs_of(text):
        yield plain[at : at + run[0]], run
        at += run[0]


def symbols(text: str) -> Iterator[Symbol]:
    return (source for _, source, _, _ in runs_of(text) if isinstance(source, Symbol))


def as_symbolic(text: str) -> str:
    """The result of an operation as SymbolicText where it has placeholders; one whose origin is lost fails."""
    if isinstance(text, SymbolicText) or not has_placeholder(text):
        return text
    if not any(True for _ in symbols(text)):
        raise NotSymbolicError
    return SymbolicText._with(text, runs_of(text))


def _failing(name: str) -> Callable[..., Never]:
    def fail(self: SymbolicText, *_: Any, **__: Any) -> Never:
        self.guards.fail()

    fail.__name__ = name
    return fail


# Everything else that reads the characters. str's own methods would read the placeholder's.
_ALLOWED = {*vars(SymbolicText), "__add__", "__str__", "__new__", "__init__", "__repr__", "__doc__", "__reduce__"}
for _name in [name for name in dir(str) if name not in _ALLOWED and name not in dir(object)]:
    setattr(SymbolicText, _name, _failing(_name))
for _name in ("__hash__", "__format__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(SymbolicText, _name, _failing(_name))
