"""Strings that remember where each of their characters comes from, through everything a chat template does to them.

The idea is taint tracking, at the level of characters: a subclass of str whose methods compute the origin of the result
along with the result, as markupsafe.Markup does for escaping. A method that cannot tell which characters it kept
gives the whole result the origin of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

TEMPLATE = -1
"""The message of text that the template writes outside its loop over the messages."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """One string of the conversation: `field` of message `message`, TEMPLATE for a tool's description."""

    message: int
    field: str


Run = tuple[int, Source | None, int, int | None]
"""So many characters; their source, None for the template's own text; where they begin in the source, UNKNOWN where the
template changed them; and the message that the template was at when it wrote them, None while they are not written."""
UNKNOWN = -1


class TracedText(str):
    """A string with the origin of its characters."""

    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    @classmethod
    def of(cls, text: str, source: Source | None, start: int = 0, written_for: int | None = None) -> TracedText:
        """`text`, all of it from `source`, from `start` on."""
        return cls._with(text, ((len(text), source, start, written_for),))

    @classmethod
    def _with(cls, text: str, runs: tuple[Run, ...]) -> TracedText:
        traced = str.__new__(cls, text)
        traced._runs = runs
        return traced

    # Jinja calls str() on every output; the inherited method returns a plain copy.
    def __str__(self) -> str:
        return self

    # Copies and pickles are plain strings: origins are meaningless outside of their rendering.
    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.plain,)

    @property
    def plain(self) -> str:
        """The same text as an exact str."""
        return str.__str__(self)

    def __add__(self, other: str) -> str:
        # SafeText.__radd__ has to escape this side.
        if not isinstance(other, str) or isinstance(other, SafeText):
            return NotImplemented
        return self._with(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return self._with(str.__add__(other, self), runs_of(other) + self._runs)

    def __mul__(self, times: SupportsIndex) -> str:
        return self._with(str.__mul__(self, times), self._runs * int(times))

    __rmul__ = __mul__

    def __mod__(self, value: Any) -> str:
        # The % operator does not report which characters came from which operand.
        return self._derived(str.__mod__(self, value))

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            # Characters of a stride or a reversed slice are not consecutive in the source.
            if step != 1:
                return self._derived(str.__getitem__(self, index))
            return self._part(start, max(start, stop))
        at = range(len(self))[index]
        return self._part(at, at + 1)

    def __iter__(self) -> Iterator[str]:
        return (self._part(at, at + 1) for at in range(len(self)))

    def _part(self, start: int, stop: int) -> TracedText:
        text = str.__getitem__(self, slice(start, stop))
        # A field of a message is one run: the fast path of templates that loop over its characters.
        if len(self._runs) == 1:
            _, source, begin, message = self._runs[0]
            return self._with(text, ((len(text), source, _moved(begin, start), message),))
        runs: list[Run] = []
        at = 0
        for length, source, begin, message in self._runs:
            first, last = max(start, at), min(stop, at + length)
            if first < last:
                runs.append((last - first, source, _moved(begin, first - at), message))
            at += length
            if at >= stop:
                break
        return self._with(text, tuple(runs))

    def _parts(self, pieces: list[str], gap: int) -> list[str]:
        """`pieces` of the text in their order, `gap` characters apart."""
        parts: list[str] = []
        at = 0
        for piece in pieces:
            parts.append(self._part(at, at + len(piece)))
            at += len(piece) + gap
        return parts

    def _derived(self, text: str) -> TracedText:
        """`text` that was made from this one: a Source, where there is one, is the origin of all of it."""
        # Case conversion keeps positions where it keeps the length, so spans stay exact.
        if len(text) == len(self):
            return self._with(text, self._runs)
        return self.of(text, source_of(self), UNKNOWN)

    def strip(self, chars: str | None = None, /) -> str:
        # Only lengths are taken from str's methods, whose results have no origin.
        start = len(self) - len(str.lstrip(self, chars))
        return self._part(start, max(start, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._part(len(prefix), len(self)) if str.startswith(self, prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self._part(0, len(self) - len(suffix)) if suffix and str.endswith(self, suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.split(self, sep, maxsplit)
        return self._parts(pieces, len(sep)) if sep is not None else self._found(pieces)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.rsplit(self, sep, maxsplit)
        return self._parts(pieces, len(sep)) if sep is not None else self._found(pieces)

    def _found(self, pieces: list[str]) -> list[str]:
        """`pieces` of the text in their order, with white space between them."""
        parts: list[str] = []
        at = 0
        for piece in pieces:
            # Only white space lies between `at` and the piece, so the first match is the right one.
            at = str.index(self, piece, at)
            parts.append(self._part(at, at + len(piece)))
            at += len(piece)
        return parts

    def splitlines(self, keepends: bool = False) -> list[str]:
        # With their line ends, since these have one or two characters and positions have to add up.
        lines = self._parts(str.splitlines(self, True), 0)
        bare = str.splitlines(self)
        return lines if keepends else [line[: len(text)] for line, text in zip(lines, bare, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._parts(list(str.partition(self, sep)), 0)
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._parts(list(str.rpartition(self, sep)), 0)
        return first, middle, last

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if old not in self:
            return self
        # An empty pattern inserts `new` between all characters, and str.split refuses it.
        if not old:
            return self._derived(str.replace(self, old, new, count))
        return join(new, self._parts(str.split(self, old, count), len(old)))

    def join(self, parts: Iterable[str], /) -> str:
        return join(self, parts)

    def upper(self) -> str:
        return self._derived(str.upper(self))

    def lower(self) -> str:
        return self._derived(str.lower(self))

    def casefold(self) -> str:
        return self._derived(str.casefold(self))

    def title(self) -> str:
        return self._derived(str.title(self))

    def capitalize(self) -> str:
        return self._derived(str.capitalize(self))

    def swapcase(self) -> str:
        return self._derived(str.swapcase(self))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return self._derived(str.expandtabs(self, tabsize))

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        return self._derived(str.center(self, width, fillchar))

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        return self._derived(str.ljust(self, width, fillchar))

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> str:
        return self._derived(str.rjust(self, width, fillchar))

    def zfill(self, width: SupportsIndex, /) -> str:
        return self._derived(str.zfill(self, width))

    def translate(self, table: Any, /) -> str:
        return self._derived(str.translate(self, table))

    def __format__(self, spec: str) -> str:
        return str.__format__(self.plain, spec)

    def __getnewargs__(self) -> tuple[str]:
        return (self.plain,)

    def labelled(self, message: int, sources: bool = True) -> TracedText:
        """The same text, written for `message` where it has no message yet; `sources`: text of fields as well."""
        runs = [run if run[3] is not None or (run[1] and not sources) else (*run[:3], message) for run in self._runs]
        return self._with(self, tuple(runs))


def _moved(start: int, by: int) -> int:
    return start if start == UNKNOWN else start + by


class SafeText(TracedText):
    """Text that went through Jinja's `safe`: what is added to it by `+` is escaped, as markupsafe.Markup does."""

    __slots__ = ()

    def __add__(self, other: str) -> str:
        other = _escaped(other)
        return self._with(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> str:
        other = _escaped(other)
        return self._with(str.__add__(other, self), runs_of(other) + self._runs)


def _escaped(text: str) -> str:
    if isinstance(text, SafeText):
        return text
    # markupsafe.escape returns Markup, whose methods drop the origins.
    for character, entity in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"}.items():
        text = text.replace(character, entity)
    return text


def runs_of(text: str) -> tuple[Run, ...]:
    """The runs of any string; an ordinary one has no origin."""
    return text._runs if isinstance(text, TracedText) else ((len(text), None, 0, None),)


def source_of(text: str) -> Source | None:
    """The first source of a string."""
    return next((source for _, source, _, _ in runs_of(text) if source is not None), None)


def concat(parts: Iterable[str]) -> str:
    """`"".join(parts)` with the origin of each part."""
    return join("", parts)


def join(separator: str, parts: Iterable[str]) -> str:
    """`separator.join(parts)` with the origin of each part."""
    parts = list(parts)
    # No origin to keep: a plain str is cheaper in everything that follows.
    if not isinstance(separator, TracedText) and not any(isinstance(part, TracedText) for part in parts):
        return separator.join(parts)
    runs: list[Run] = []
    for index, part in enumerate(parts):
        if index and separator:
            runs += runs_of(separator)
        runs += runs_of(part)
    return TracedText._with(str.join(separator, parts), tuple(runs))


def trace(value: Any, message: int, field: str) -> Any:
    """`value` of nested lists and mappings with every string traced to `field` of `message`, keys included."""
    return _mapped(value, lambda text: TracedText.of(text, Source(message, field)))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value
