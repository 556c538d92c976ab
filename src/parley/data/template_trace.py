"""Origins of what a chat template writes: statements added to its syntax tree, and the state they keep.

each output        remembers for which message it was written
each loop          counts its rounds and knows the message it is at
each assignment    in a loop over indices (`{% set message = messages[i] %}`) does the same
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import thread_time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

from parley.data.template_limits import (
    MAX_CHARACTERS,
    MAX_SECONDS,
    MAX_STEPS,
    MAX_WORK,
    TemplateLimitError,
    too_long,
)
from parley.data.traced_text import TEMPLATE, Source, TracedText, join, source_of, trace

STATE = "parley_trace"
"""The variable that holds a rendering's Trace."""


@dataclass
class Trace:
    """What one rendering knows while it runs. `loops` has, for each open loop, whether it is over messages, and the
    message that was current before it."""

    roles: Sequence[Any] = ()
    message: int = TEMPLATE
    loops: list[tuple[bool, int]] = field(default_factory=list)
    steps: int = 0
    work: int = 0
    written: int = 0
    began: float = field(default_factory=thread_time)

    def step(self) -> None:
        self.steps += 1
        # Reading the clock of a thread is a system call, which every step would feel.
        if not self.steps & 15 and thread_time() - self.began > MAX_SECONDS:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:.0f} seconds over these messages")
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps over these messages")

    def at(self, number: int) -> None:
        """The template is at message `number`; a look back at an assistant's turn leaves it where it is."""
        if self.message == TEMPLATE or self.roles[number] != "assistant" or self.roles[self.message] == "assistant":
            self.message = number

    def made(self, value: Any) -> None:
        """Count a string or a list that the template made."""
        if not isinstance(value, str | list | tuple):
            return
        self.work += len(value)
        if len(value) > MAX_CHARACTERS or self.work > MAX_WORK:
            raise too_long()


class TracedMessage(dict[str, Any]):
    """A message that knows its number."""

    __slots__ = ("_number",)

    def __init__(self, fields: dict[str, Any], number: int) -> None:
        super().__init__(fields)
        self._number = number


def traced_message(message: dict[str, Any], number: int) -> TracedMessage:
    # A role is not traced: some templates write control tokens around it ('<|' + role + '|>'), which are their own.
    fields = {name: value if name == "role" else trace(value, number, name) for name, value in message.items()}
    return TracedMessage(fields, number)


def state_of(context: Context) -> Trace:
    # `parent` holds what render() was given; assignments in the template go to `vars` and cannot replace it.
    return context.parent[STATE]


@jinja2.pass_context
def _emit(context: Context, value: Any) -> str:
    """An output: what it writes, the template's own text in it as written for the current message."""
    state = state_of(context)
    text = value if isinstance(value, str) else str(value)
    state.made(text)
    state.written += str.__len__(text)
    if state.written > MAX_CHARACTERS:
        raise too_long()
    if isinstance(text, TracedText):
        return text.labelled(state.message)
    return TracedText.of(text, None, written_for=state.message)


@jinja2.pass_context
def _open_loop(context: Context, _: Any) -> str:
    state = state_of(context)
    state.loops.append((False, state.message))
    return ""


@jinja2.pass_context
def _close_loop(context: Context, _: Any) -> str:
    state = state_of(context)
    state.message = state.loops.pop()[1]
    return ""


@jinja2.pass_context
def _next_round(context: Context, item: Any) -> str:
    state = state_of(context)
    state.step()
    number = _number(item)
    if number is not None:
        outside = state.loops[-1][1]
        state.loops[-1] = True, outside
        state.message = outside
        state.at(number)
    return ""


@jinja2.pass_context
def _assigned(context: Context, value: Any) -> str:
    """In a loop over something else than messages, a message that is looked up is the current one."""
    state = state_of(context)
    if state.loops and not state.loops[-1][0]:
        number = _number(value)
        if number is not None:
            state.message = state.loops[-1][1]
            state.at(number)
    return ""


@jinja2.pass_context
def _kept(context: Context, value: Any) -> Any:
    """A value that is assigned: text is written for the message that it was put together for, whenever it comes out."""
    state = state_of(context)
    state.made(value)
    if not isinstance(value, TracedText) or state.message == TEMPLATE:
        return value
    return value.labelled(state.message, sources=False)


def _number(value: Any) -> int | None:
    """The number of a message, or of the message whose content a mapping was built from."""
    if isinstance(value, TracedMessage):
        return value._number
    if isinstance(value, dict) and "role" in value:
        for name in ("content", "tool_calls"):
            source = first_source(value.get(name))
            if source is not None:
                return source.message
    return None


def first_source(value: Any) -> Source | None:
    """The first source in nested lists and mappings."""
    if isinstance(value, str):
        return source_of(value)
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = [*value.values(), *value]
    elif isinstance(value, list | tuple):
        items = value
    return next((found for item in items if (found := first_source(item)) is not None), None)


class Tracing(NodeTransformer):
    """Adds to a template's syntax tree the statements of this module's docstring."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered("parley_emit", _as_constant(child)) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        # Jinja compiles `~` to a join of plain strings, which would drop the origins.
        return _filtered("parley_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        item = node.target if isinstance(node.target, nodes.Name) else None
        shown = nodes.Name(item.name, "load", lineno=node.lineno) if item else nodes.Const(None, lineno=node.lineno)
        # First in the body, where `continue` cannot skip it.
        node.body.insert(0, _statement("parley_round", shown))
        nothing = nodes.Const(None, lineno=node.lineno)
        return [_statement("parley_open", nothing), node, _statement("parley_close", nothing)]

    def visit_Assign(self, node: nodes.Assign) -> Any:
        self.generic_visit(node)
        assert isinstance(node.node, nodes.Expr)
        node.node = _filtered("parley_kept", node.node)
        if not isinstance(node.target, nodes.Name):
            return node
        return [node, _statement("parley_assigned", nodes.Name(node.target.name, "load", lineno=node.lineno))]


def _as_constant(child: nodes.Expr) -> nodes.Expr:
    return nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child


def _filtered(name: str, expression: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _statement(name: str, expression: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filtered(name, expression), lineno=expression.lineno)


@jinja2.pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    if sum(map(str.__len__, texts)) > MAX_CHARACTERS:
        raise too_long()
    text = join("", texts)
    state_of(context).made(text)
    return text


TRACE_FILTERS = {
    "parley_emit": _emit,
    "parley_open": _open_loop,
    "parley_close": _close_loop,
    "parley_round": _next_round,
    "parley_assigned": _assigned,
    "parley_concat": _concat,
    "parley_kept": _kept,
}
"""The filters that the statements of `Tracing` apply."""
