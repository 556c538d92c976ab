"""A chat template run over SymbolicText: the layout of the text it writes around any contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Never

from jinja2 import nodes
from jinja2.runtime import Context

from parley.data.symbolic_text import (
    Guards,
    NotSymbolicError,
    Strips,
    Symbol,
    SymbolicText,
    as_symbolic,
    has_placeholder,
    placeholder,
)
from parley.data.template_environment import Environment
from parley.data.template_limits import with_pass_arg
from parley.data.template_trace import STATE, Trace, TracedMessage, Tracing, state_of
from parley.data.traced_text import concat, runs_of

_TEXT_FILTERS = {"trim", "string", "default", "d", "parley_emit", "parley_kept", "parley_assigned", "parley_round"}
"""Filters that do with a SymbolicText what they do with any text."""
_JOINING = {"join", "parley_concat"}
"""Filters that join texts, those of lists and mappings as they are."""
_TEXT_TESTS = {"string": True, "sequence": True, "iterable": True, "defined": True}
_TEXT_TESTS |= dict.fromkeys(["undefined", "none", "mapping", "number", "integer", "float", "boolean"], False)
_TEXT_TESTS |= dict.fromkeys(["true", "false", "callable"], False)
"""Tests of the type of a value, and what they say of text."""
_COMPARISONS = {"eq", "equalto", "==", "ne", "!="}
"""Tests that ask the SymbolicText itself."""


@dataclass(frozen=True)
class Field:
    """The content of a message in a layout: the text before it, and how it is stripped."""

    before: str
    message: int
    strips: Strips

    def value(self, contents: Sequence[str]) -> str:
        return _stripped(contents[self.message], self.strips)


@dataclass(frozen=True)
class TextLayout:
    """What a template writes for conversations of the same roles, around contents that fulfil the guards."""

    fields: tuple[Field, ...]
    after: str
    absent: tuple[str, ...]
    nonempty: tuple[tuple[int, Strips], ...]

    def values(self, contents: Sequence[str]) -> list[str] | None:
        """The texts of the fields; None where the layout does not hold for `contents`."""
        for content in contents:
            if not content or content.isspace():
                return None
            for constant in self.absent:
                if constant in content:
                    return None
        if not all(_stripped(contents[message], strips) for message, strips in self.nonempty):
            return None
        return [field.value(contents) for field in self.fields]

    def text(self, values: Sequence[str]) -> str:
        parts = [part for field, value in zip(self.fields, values, strict=True) for part in (field.before, value)]
        return "".join([*parts, self.after])


def _stripped(text: str, strips: Strips) -> str:
    for method, chars in strips:
        text = method(text, chars)
    return text


class SymbolicTemplate:
    """A template compiled to run over placeholders. Raises jinja2.TemplateSyntaxError for what is not Jinja."""

    def __init__(self, source: str) -> None:
        environment = _SymbolicEnvironment()
        self.template = environment.from_string(_SymbolicTracing().visit(environment.parse(source)))

    def layout(self, roles: Sequence[str], **variables: Any) -> TextLayout:
        """The layout of conversations of these roles, messages of role and content alone.

        Raises NotSymbolicError where it depends on more than that, and whatever the template does.
        """
        guards = Guards()
        messages = [
            TracedMessage({"role": role, "content": SymbolicText.content(number, guards)}, number)
            for number, role in enumerate(roles)
        ]
        chunks = self.template.generate(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=False,
            **variables,
            **{STATE: _SymbolicTrace(roles)},
        )
        text = _symbolic(concat(chunks))
        if guards.failed:
            raise NotSymbolicError
        return _layout_of(text, guards)


def _layout_of(text: str, guards: Guards) -> TextLayout:
    fields: list[Field] = []
    plain, at, before = str.__str__(text), 0, ""
    for length, source, _, _ in runs_of(text):
        piece = plain[at : at + length]
        at += length
        if not isinstance(source, Symbol):
            if has_placeholder(piece):
                raise NotSymbolicError
            before += piece
            continue
        if piece != placeholder(source.message):
            raise NotSymbolicError
        fields.append(Field(before, source.message, source.strips))
        before = ""
    return TextLayout(tuple(fields), before, tuple(guards.absent), tuple(guards.nonempty))


class _SymbolicTrace(Trace):
    def made(self, value: Any) -> None:
        # The length of a placeholder is not that of a content, and its __len__ fails.
        super().made(str.__str__(value) if isinstance(value, str) else value)


class _SymbolicEnvironment(Environment):
    """The sandbox, with every operation that could see a placeholder watched."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = {name: _watched_filter(name, function) for name, function in self.filters.items()}
        self.filters["parley_in"] = _in
        tests: dict[str, Any] = {**self.tests}
        self.tests = {name: _watched_test(name, function) for name, function in tests.items()}
        self.globals["strftime_now"] = _fail  # the text would be another tomorrow

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return _symbolic(concat(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and (isinstance(left, SymbolicText) or isinstance(right, SymbolicText)):
            _fail()
        return _symbolic(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if not isinstance(owner, str):
            return _symbolic(super().call(__context, __obj, *args, **kwargs))
        if isinstance(owner, SymbolicText):
            # Past Environment.call, which reads the length of a text, and joins and formats it by functions of its own.
            state_of(__context).step()
            if name in ("format", "format_map", "join"):
                _fail()
            return __context.call(__obj, *args, **kwargs)
        # Jinja hands the variables of the loop and block along, for methods that take the context.
        given = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]
        if name != "join" and _holds_symbols([args, given]):
            _fail()
        return _symbolic(super().call(__context, __obj, *args, **kwargs))


class _SymbolicTracing(Tracing):
    """Turns `in` into a filter: a text to the right of it would not ask the placeholder to its left."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if not any(operand.op in ("in", "notin") for operand in node.ops):
            return node
        if len(node.ops) > 1:
            _fail()
        found = nodes.Filter(node.expr, "parley_in", [node.ops[0].expr], [], None, None, lineno=node.lineno)
        return found if node.ops[0].op == "in" else nodes.Not(found, lineno=node.lineno)


def _in(value: Any, container: Any) -> bool:
    if isinstance(value, SymbolicText) and isinstance(container, str):
        _fail()
    return value in container


def _watched_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        if name in _TEXT_FILTERS:
            return _symbolic(function(*args, **kwargs))
        if any(isinstance(value, SymbolicText) for value in (*args, *kwargs.values())):
            _fail()
        result = function(*args, **kwargs)
        # JSON and the like escape what a content says.
        if isinstance(result, str) and name not in _JOINING and _holds_symbols([args, kwargs]):
            _fail()
        return _symbolic(result)

    return with_pass_arg(watched, function)


def _watched_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SymbolicText) and name in _TEXT_TESTS:
            return _TEXT_TESTS[name]
        if name not in _COMPARISONS and any(isinstance(value, SymbolicText) for value in (*args, *kwargs.values())):
            _fail()
        return function(*args, **kwargs)

    return with_pass_arg(watched, function)


def _symbolic(value: Any) -> Any:
    return as_symbolic(value) if isinstance(value, str) else value


def _holds_symbols(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_symbols, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_symbols, value))
    return isinstance(value, SymbolicText)


def _fail(*_: Any) -> Never:
    raise NotSymbolicError
