"""A chat template run once, with the origin of every character it writes, in bounded time and memory.

transformers runs a template in a Jinja sandbox that gives back a string. Here the same template runs in the same
sandbox over traced strings (parley.data.traced_text), with three statements added to its syntax tree:

    each output        remembers for which message it was written
    each loop          counts its rounds and knows the message it is at
    each assignment    in a loop over indices (`{% set message = messages[i] %}`) does the same

So nothing has to be searched for in the text: what a message says, and what the template writes around it, is known.
A template is a program from elsewhere. The sandbox keeps it from files; the limits here keep it from running or growing
without end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from parley.data.traced_text import (
    TEMPLATE,
    UNKNOWN,
    Run,
    SafeText,
    Source,
    TracedText,
    concat,
    join,
    runs_of,
    source_of,
    trace,
)

# Jinja's sandbox bounds range() alone: 'a' * 10**12, 9**9**9 or nested loops would take all memory or never end.
MAX_STEPS = 20_000_000
"""Rounds of loops and calls in one rendering: about a minute. 6,000 turns need 18 million where a template looks
through all turns at each turn."""
MAX_CHARACTERS = 1 << 27
"""Characters of one string, or items of one list, that a template makes."""
MAX_WORK = 1 << 35
"""Characters of all strings that one rendering makes, those it throws away included."""
_MAX_BITS = 1 << 14
"""Bits of a number."""
_STATE = "parley_trace"
_WIDTH = re.compile(r"\d{6,}|\*")
_RESIZING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "round"}


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that runs or grows beyond any use."""


@dataclass
class Trace:
    """What one rendering knows while it runs. `loops` has, for each open loop, whether it is over messages, and the
    message that was current before it."""

    roles: Sequence[Any] = ()
    message: int = TEMPLATE
    loops: list[tuple[bool, int]] = field(default_factory=list)
    steps: int = 0
    work: int = 0

    def step(self) -> None:
        self.steps += 1
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
            raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")


class _TracedMessage(dict[str, Any]):
    """A message that knows its number."""

    __slots__ = ("_number",)

    def __init__(self, fields: dict[str, Any], number: int) -> None:
        super().__init__(fields)
        self._number = number


@dataclass(frozen=True)
class RenderedText:
    """What a template wrote: the text, and its runs in order."""

    text: str
    runs: tuple[Run, ...]


class ChatTemplate:
    """A compiled template. Raises jinja2.TemplateSyntaxError for what is not Jinja.

    has_constant_prompt: the generation prompt does not depend on the messages. `generation_prompts` then caches it for
    each set of special tokens.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment()
        tree = environment.parse(source)
        self.has_constant_prompt = _has_constant_prompt(tree)
        self.generation_prompts: dict[tuple[Any, ...], str] = {}
        self.template = environment.from_string(_Tracing().visit(tree))

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool, **variables: Any
    ) -> RenderedText:
        """The text for `messages`, with a generation prompt or without. Raises whatever the template does."""
        chunks = self.template.generate(
            messages=[_traced_message(message, number) for number, message in enumerate(messages)],
            tools=trace(list(tools), TEMPLATE, "tools") if tools is not None else None,
            # transformers passes it too, and templates test `documents is defined`.
            documents=None,
            add_generation_prompt=prompt,
            **variables,
            **{_STATE: Trace([message.get("role") for message in messages])},
        )
        text = concat(chunks)
        return RenderedText(str.__str__(text), runs_of(text))

    @cached_property
    def takes_object_arguments(self) -> bool:
        """Whether a call's arguments may be an object."""
        return self._written_call({"q": "ab"}) is not None

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether a call's arguments given as text are written unchanged, numbers as they are."""
        # json.dumps of the parsed object would write 1.1.
        text = '{"q": 1.10}'
        written = self._written_call(text)
        return written is not None and text in written and f'"{text}"' not in written

    def _written_call(self, arguments: Any) -> str | None:
        # Mistral's templates refuse ids that are not nine alphanumeric characters.
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}
        messages: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            return self.render(messages, None, False, bos_token="", eos_token="").text
        # A template that fails on the probe does not take arguments of this type, whatever it raises.
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
            return None


@lru_cache(maxsize=16)
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)


def _traced_message(message: dict[str, Any], number: int) -> _TracedMessage:
    # A role is not traced: some templates write control tokens around it ('<|' + role + '|>'), which are their own.
    fields = {name: value if name == "role" else trace(value, number, name) for name, value in message.items()}
    return _TracedMessage(fields, number)


def _state(context: Context) -> Trace:
    # `parent` holds what render() was given; assignments in the template go to `vars` and cannot replace it.
    return context.parent[_STATE]


@jinja2.pass_context
def _emit(context: Context, value: Any) -> str:
    """An output: what it writes, the template's own text in it as written for the current message."""
    state = _state(context)
    text = value if isinstance(value, str) else str(value)
    state.made(text)
    if isinstance(text, TracedText):
        return text.labelled(state.message)
    return TracedText.of(text, None, written_for=state.message)


@jinja2.pass_context
def _open_loop(context: Context, _: Any) -> str:
    state = _state(context)
    state.loops.append((False, state.message))
    return ""


@jinja2.pass_context
def _close_loop(context: Context, _: Any) -> str:
    state = _state(context)
    state.message = state.loops.pop()[1]
    return ""


@jinja2.pass_context
def _next_round(context: Context, item: Any) -> str:
    state = _state(context)
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
    state = _state(context)
    if state.loops and not state.loops[-1][0]:
        number = _number(value)
        if number is not None:
            state.message = state.loops[-1][1]
            state.at(number)
    return ""


@jinja2.pass_context
def _kept(context: Context, value: Any) -> Any:
    """A value that is assigned: text is written for the message that it was put together for, whenever it comes out."""
    state = _state(context)
    state.made(value)
    if not isinstance(value, TracedText) or state.message == TEMPLATE:
        return value
    return value.labelled(state.message, sources=False)


def _number(value: Any) -> int | None:
    """The number of a message, or of the message whose content a mapping was built from."""
    if isinstance(value, _TracedMessage):
        return value._number
    if isinstance(value, dict) and "role" in value:
        for name in ("content", "tool_calls"):
            source = _source(value.get(name))
            if source is not None:
                return source.message
    return None


def _source(value: Any) -> Source | None:
    """The first source in nested lists and mappings."""
    if isinstance(value, str):
        return source_of(value)
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = [*value.values(), *value]
    elif isinstance(value, list | tuple):
        items = value
    return next((found for item in items if (found := _source(item)) is not None), None)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' tojson (json.dumps with no HTML escapes), with origins."""
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    text = json.dumps(value, **options)  # type: ignore[arg-type]
    source = _source(value)
    if source is None:
        return text
    if isinstance(value, TracedText):
        inside = text[1:-1]
        middle = value if inside == value else TracedText.of(inside, source, UNKNOWN)
        return concat(['"', middle, '"'])
    return _json_runs(value, text) or TracedText.of(text, source, UNKNOWN)


def _json_runs(value: Any, text: str) -> str | None:
    """`text`, the JSON of `value`, with the origin of every string in it, found in their order."""
    parts: list[str] = []
    at = 0
    # Each search starts where the previous string ended, since the same text may occur several times.
    for item in _json_strings(value):
        for ascii_only in (False, True):
            written = json.dumps(item, ensure_ascii=ascii_only)
            start = text.find(written, at)
            if start >= 0:
                break
        else:
            return None
        parts += [text[at:start], _tojson(item, ensure_ascii=ascii_only)]
        at = start + len(written)
    return concat([*parts, text[at:]])


def _json_strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _json_strings(key)
            yield from _json_strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _json_strings(item)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """transformers' `dict`: what can be called, and nothing to break out by."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class Generation(Extension):
    """TRL's and transformers' `{% generation %}`: here, its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _traced_join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = [item[attribute] for item in value]
    return join(d, [item if isinstance(item, str) else str(item) for item in value])


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's indent over traced lines (jinja2.filters.do_indent)."""
    space = width if isinstance(width, str) else " " * width
    lines = (s + "\n").splitlines()
    rest = [space + line if line or blank else line for line in lines[1:]]
    text = join("\n", [*lines[:1], *rest])
    return space + text if first else text


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return [] if isinstance(value, jinja2.Undefined) else list(value.items())


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' sandbox for chat templates (_compile_jinja_template), with limits and origins."""

    # Jinja hands only these operators to call_binop. No other makes a value much larger than its operands.
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols], cache_size=0
        )
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "dict": _Dict()}
        self.globals["namespace"] = Namespace
        del self.globals["lipsum"]  # random text of any requested length
        for name in _RESIZING & self.filters.keys():
            self.filters[name] = _checked(self.filters[name])
        self.filters |= {"tojson": _tojson, "join": _traced_join, "indent": _checked(_indent)}
        self.filters |= {"safe": _safe, "string": _text, "items": _items, "format": _format}
        self.filters |= {"parley_emit": _emit, "parley_open": _open_loop, "parley_close": _close_loop}
        self.filters |= {
            "parley_round": _next_round,
            "parley_assigned": _assigned,
            "parley_concat": _concat,
            "parley_kept": _kept,
        }

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            result = left + right
        else:
            _check_operands(operator, left, right)
            result = self.binop_table[operator](left, right)
        _state(context).made(result)
        return result

    # Named as in Jinja's own sandbox, so that a template may pass keyword arguments self, context and obj.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        state = _state(__context)
        state.step()
        if isinstance(owner, str):
            if name in _RESIZING:
                _check_sizes(args, kwargs)
            elif name == "join":
                __obj = lambda parts: join(owner, parts)  # noqa: E731
            # Checked before the call: a check of the result comes when the memory is already allocated.
            elif name == "replace" and len(args) > 1 and len(owner) * len(args[1]) > MAX_CHARACTERS:
                raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
        result = super().call(__context, __obj, *args, **kwargs)
        state.made(result)
        return result


class _Tracing(NodeTransformer):
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


def _has_constant_prompt(tree: nodes.Template) -> bool:
    """Whether everything that depends on add_generation_prompt is one branch at the end that reads no message."""
    name = "add_generation_prompt"
    last = tree.body[-1] if tree.body else None
    if isinstance(last, nodes.Output) and len(tree.body) > 1 and not list(last.find_all(nodes.Name)):
        last = tree.body[-2]
    if not isinstance(last, nodes.If):
        return False
    inside = [found.name for found in last.find_all(nodes.Name)]
    everywhere = [found.name for found in tree.find_all(nodes.Name)]
    stored = {found.name for found in tree.find_all(nodes.Name) if found.ctx == "store"}
    free = jinja2.meta.find_undeclared_variables(tree)
    return (
        name in inside
        and inside.count(name) == everywhere.count(name)
        and set(inside) <= free - stored - {"messages", "tools"}
        and not list(last.find_all((nodes.For, nodes.Call)))
    )


def _as_constant(child: nodes.Expr) -> nodes.Expr:
    return nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child


def _filtered(name: str, expression: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)


def _statement(name: str, expression: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filtered(name, expression), lineno=expression.lineno)


@jinja2.pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    text = join("", [part if isinstance(part, str) else str(part) for part in parts])
    _state(context).made(text)
    return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _safe(value: Any) -> str:
    text = _text(value)
    return SafeText._with(text, runs_of(text))


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value)
    return value % (kwargs or args)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses sizes beyond any use."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_sizes(args, kwargs)
        return function(*args, **kwargs)

    # Jinja reads from this attribute whether a filter takes the context or the environment as its first argument.
    for flag in ("jinja_pass_arg",):
        if hasattr(function, flag):
            setattr(checked, flag, getattr(function, flag))
    return checked


def _check_sizes(args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > 10_000:
            raise TemplateLimitError(f"it asks for a width of {value:,}")


def _check_format(format: str) -> None:
    if _WIDTH.search(format):
        raise TemplateLimitError("it formats to a width of a million or more")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_format(left)
    for many, times in ((left, right), (right, left)):
        repeated = operator == "*" and isinstance(many, str | list | tuple) and isinstance(times, int)
        if repeated and len(many) * times > MAX_CHARACTERS:
            raise TemplateLimitError(f"it writes more than {MAX_CHARACTERS:,} characters")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
        if bits > _MAX_BITS:
            raise TemplateLimitError(f"it computes a number of more than {_MAX_BITS:,} bits")
