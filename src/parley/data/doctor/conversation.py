"""A row as the checks see it: its turns with their texts, whatever format it came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from parley.data.control_tokens import strings
from parley.data.example import LOSS_KEYS, Example, Message


@dataclass(frozen=True)
class Turn:
    """`content`: what the turn says. `other`: its reasoning, tool calls and other texts. `calls`: it calls a tool."""

    role: str
    content: str
    other: tuple[str, ...] = ()
    calls: bool = False


@dataclass(frozen=True)
class Conversation:
    """The turns of one row. `plain`: the row is text in the model's format already, without roles."""

    origin: str
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()
    plain: bool = False

    @cached_property
    def text(self) -> str:
        """Every text of the row, a line each."""
        return "\n".join(text for turn in self.turns for text in (turn.content, *turn.other))

    @cached_property
    def prompt(self) -> str:
        """What the model reads, without system turns: many rows share theirs."""
        return "\n".join(self._texts({"user", "tool"}))

    @cached_property
    def answer(self) -> str:
        """What the model is to say."""
        return "\n".join(self._texts({"assistant"}))

    @cached_property
    def answers(self) -> list[str]:
        """The contents of the assistant's turns that do not call tools."""
        return [turn.content for turn in self.turns if turn.role == "assistant" and not turn.calls]

    def _texts(self, roles: set[str]) -> Iterator[str]:
        return (text for turn in self.turns if turn.role in roles for text in (turn.content, *turn.other))


def conversation_of(example: Example) -> Conversation:
    """The turns of `example`; token ids are one turn of numbers."""
    if example.input_ids is not None:
        ids = " ".join(map(str, example.input_ids))
        return Conversation(example.origin, (Turn("assistant", ids),), plain=True)
    if example.text is not None:
        return Conversation(example.origin, (Turn("assistant", example.text),), plain=True)
    if isinstance(example.prompt, str) and isinstance(example.completion, str):
        turns = (Turn("user", example.prompt), Turn("assistant", example.completion))
        return Conversation(example.origin, turns)
    if isinstance(example.prompt, list) and isinstance(example.completion, list):
        messages = [*example.prompt, *example.completion]
    else:
        messages = example.messages or []
    tools = tuple(strings(example.tools)) if example.tools else ()
    return Conversation(example.origin, tuple(map(_turn, messages)), tools)


def _turn(message: Message) -> Turn:
    if len(message) == 2:  # role and content, as most messages
        return Turn(message["role"], message["content"])
    other = {name: value for name, value in message.items() if name not in ("role", "content", *LOSS_KEYS)}
    return Turn(message["role"], message["content"], tuple(strings(other)), bool(message.get("tool_calls")))
