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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from parley.data.template_environment import Environment
from parley.data.template_trace import STATE, Trace, Tracing, traced_message
from parley.data.traced_text import TEMPLATE, Run, concat, runs_of, trace


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
        self.source = source
        environment = Environment()
        tree = environment.parse(source)
        self.has_constant_prompt = _has_constant_prompt(tree)
        self.generation_prompts: dict[tuple[Any, ...], str] = {}
        self.template = environment.from_string(Tracing().visit(tree))

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None, prompt: bool, **variables: Any
    ) -> RenderedText:
        """The text for `messages`, with a generation prompt or without. Raises whatever the template does."""
        chunks = self.template.generate(
            messages=[traced_message(message, number) for number, message in enumerate(messages)],
            tools=trace(list(tools), TEMPLATE, "tools") if tools is not None else None,
            # transformers passes it too, and templates test `documents is defined`.
            documents=None,
            add_generation_prompt=prompt,
            **variables,
            **{STATE: Trace([message.get("role") for message in messages])},
        )
        text = concat(chunks)
        return RenderedText(str.__str__(text), runs_of(text))

    @cached_property
    def takes_object_arguments(self) -> bool:
        """Whether a call's arguments may be an object, and are not written as Python writes a dict."""
        written = self._written_call({"q": "ab"})
        return written is not None and "{'q': 'ab'}" not in written

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
