"""The formats a data set may come in: each an object that knows its columns and turns a row into an Example.

A new format is a subclass of Format and an entry in FORMATS. Order matters: a row that suits several is of the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from parley.config import DataSection
from parley.data.columns import Fields, Spellings
from parley.data.example import WEIGHT, Example, Message
from parley.data.files import Row
from parley.data.loss_weights import row_weight
from parley.data.messages import joined, parse_messages, with_system
from parley.data.pretokenized import parse_ids, parse_labels
from parley.data.tool_calls import parse_json, parse_tools
from parley.data.values import short, type_name
from parley.errors import DataError, UsageError

_SYSTEM = ("system", "system_prompt")


class Format(ABC):
    """One data format.

    name: its value of `data.format`. label: its name in messages. columns: those every row needs. optional: those it
    reads besides. note: what else it was recognised by, for the message.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    columns: ClassVar[Spellings]
    optional: ClassVar[Spellings] = ()
    note: ClassVar[str] = ""

    def fields(self, row: Row, origin: str, data: DataSection) -> Fields:
        return Fields(row, origin, (*self.columns, *self.optional), data)

    def suits(self, fields: Fields, expected: str | None) -> bool:
        """Whether a row has what this format needs. `expected`: the format of the data set so far."""
        return all(names[0] in fields.own for names in self.columns)

    def shows(self, fields: Fields) -> bool:
        """Whether a row that suits the format has enough in it to recognise the data set by."""
        return True

    @abstractmethod
    def example(self, fields: Fields, data: DataSection) -> Example:
        """The row as an Example. Raises DataError naming it."""

    @classmethod
    def spellings(cls) -> list[str]:
        return [name for names in (*cls.columns, *cls.optional) for name in names]


class _Turns(Format):
    """Conversations as a list of turns."""

    optional = (_SYSTEM, ("tools", "functions"))
    turn_format: ClassVar[str]

    def suits(self, fields: Fields, expected: str | None) -> bool:
        # Data sets use the column names of both formats for either; the keys of the turns decide.
        return super().suits(fields, expected) and self._turn_format(fields, expected) == self.name

    def shows(self, fields: Fields) -> bool:
        # An empty list of turns has no keys to decide by; a later row does.
        return bool(fields.value(self.columns[0][0]))

    def example(self, fields: Fields, data: DataSection) -> Example:
        column = self.columns[0][0]
        messages = _messages(fields, column, data)
        messages = with_system(messages, fields.text("system") or data.system)
        return Example(fields.origin, messages=messages, tools=parse_tools(fields.value("tools"), fields.origin))

    def _turn_format(self, fields: Fields, expected: str | None) -> str:
        """ "messages" or "sharegpt"; where the turns fit both, the expected one or "messages"."""
        turns = fields.value(self.columns[0][0])
        first = turns[0] if isinstance(turns, list) and turns else None
        # A turn may have both keys, or neither where data.columns names others.
        if isinstance(first, dict) and ("from" in first) != ("role" in first):
            return ShareGPT.name if "from" in first else Messages.name
        return expected if expected in (Messages.name, ShareGPT.name) else Messages.name


class Messages(_Turns):
    """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "tools": [...]}"""

    name = "messages"
    label = "messages"
    columns = (("messages", "conversations", "conversation"),)
    note = ", turns with role and content"


class ShareGPT(_Turns):
    """{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "..."}"""

    name = "sharegpt"
    label = "ShareGPT"
    columns = (("conversations", "conversation", "messages"),)
    note = ", turns with from and value"


class _Instruction(Format):
    """An instruction with its answer; `context` precedes the instruction, `input` follows it."""

    optional = (("context",), ("input",), _SYSTEM, ("history",))
    _answer: ClassVar[str]

    def example(self, fields: Fields, data: DataSection) -> Example:
        prompt = joined(fields.text(name) for name in ("context", "instruction", "input"))
        turns = [*history_turns(fields), ("user", prompt), ("assistant", fields.text(self._answer))]
        messages: list[Message] = [{"role": role, "content": text} for role, text in turns if text.strip()]
        messages = with_system(messages, fields.text("system") or data.system)
        return _weighted(Example(fields.origin, messages=messages), fields)


class Alpaca(_Instruction):
    """{"instruction": "Translate to French:", "input": "cheese", "output": "fromage", "history": [["Hi", "Hello"]]}"""

    name = "alpaca"
    label = "Alpaca"
    columns = (("instruction",), ("output", "response"))
    _answer = "output"

    def suits(self, fields: Fields, expected: str | None) -> bool:
        """Rows without an input are Alpaca's by the name of the answer, unless the data set is Dolly's so far."""
        if not super().suits(fields, expected):
            return False
        # `row` besides `own`: an `input` column that is null in this row is still a sign of Alpaca.
        marked = {"input", "output"} & {*fields.own.values(), *fields.row, *fields.data.columns}
        return expected == self.name or (bool(marked) and "context" not in fields.own)


class Dolly(_Instruction):
    """{"instruction": "Who wrote it?", "context": "A page about a book.", "response": "Its author."}"""

    name = "dolly"
    label = "Dolly"
    columns = (("instruction",), ("response", "output"))
    _answer = "response"


class PromptCompletion(Format):
    """{"prompt": "Two and two is ", "completion": "four"}, or both as lists of messages"""

    name = "prompt-completion"
    label = "prompt and completion"
    columns = (("prompt",), ("completion",))
    optional = (("tools",),)

    def example(self, fields: Fields, data: DataSection) -> Example:
        prompt, completion = fields.value("prompt"), fields.value("completion")
        if not isinstance(prompt, list) and not isinstance(completion, list):
            _refuse_system(data)
            example = Example(fields.origin, prompt=fields.text("prompt"), completion=fields.text("completion"))
            return _weighted(example, fields)
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise DataError(
                f"{fields.origin}: 'prompt' is {type_name(prompt)} and 'completion' is {type_name(completion)}; "
                "wanted both as text or both as lists of messages"
            )
        return Example(
            fields.origin,
            # The completion continues the prompt's conversation, so the system turn is added to the prompt alone.
            prompt=with_system(_messages(fields, "prompt", data), data.system),
            completion=_messages(fields, "completion", data),
            tools=parse_tools(fields.value("tools"), fields.origin),
        )


class Tokens(Format):
    """{"input_ids": [1, 5, 7], "labels": [-100, 5, 7]}, or with a mask of ones and zeros in place of labels"""

    name = "tokens"
    label = "token ids"
    columns = (("input_ids",),)
    optional = (("labels",), ("assistant_masks", "assistant_mask", "completion_mask"), ("attention_mask",))

    def example(self, fields: Fields, data: DataSection) -> Example:
        _refuse_system(data)
        ids = parse_ids(fields.value("input_ids"), f"{fields.origin}: field {fields.own['input_ids']!r}")
        ids, labels = parse_labels(ids, fields)
        return Example(fields.origin, input_ids=ids, labels=labels)


class Text(Format):
    """{"text": "Any text, supervised from its first word to its last."}"""

    name = "text"
    label = "text"
    columns = (("text",),)

    def example(self, fields: Fields, data: DataSection) -> Example:
        _refuse_system(data)
        return _weighted(Example(fields.origin, text=fields.text("text")), fields)


# Structured columns come before `text`: many data sets keep a rendered copy of each row in a `text` column.
FORMATS: tuple[Format, ...] = (
    Messages(),
    ShareGPT(),
    Alpaca(),
    Dolly(),
    PromptCompletion(),
    Tokens(),
    Text(),
)
BY_NAME = {format.name: format for format in FORMATS}


def _messages(fields: Fields, column: str, data: DataSection) -> list[Message]:
    keys: dict[str, str] = {key: data.columns[key] for key in ("role", "content") if key in data.columns}
    messages = parse_messages(fields.value(column), fields.origin, fields.own[column], keys=keys, roles=data.roles)
    weight = row_weight(fields.row, fields.flags(), fields.origin)
    if weight is not None:
        for message in messages:
            if message["role"] == "assistant":
                message[WEIGHT] = weight * message.get(WEIGHT, 1.0)
    return messages


def _weighted(example: Example, fields: Fields) -> Example:
    """`example` with the row's own loss flags on its assistant turns. Rows of text know only "all of it"."""
    weight = row_weight(fields.row, fields.flags(), fields.origin)
    if weight is None or weight == 1:
        return example
    if example.messages is None:
        raise DataError(f"{fields.origin}: got a loss weight of {weight:g} on text; leave the row out, or use messages")
    for message in example.messages:
        if message["role"] == "assistant":
            message[WEIGHT] = weight
    return example


def history_turns(fields: Fields) -> list[tuple[str, str]]:
    """Earlier turns of an instruction: [["question", "answer"], ...]."""
    history = fields.value("history")
    location = f"{fields.origin}: field 'history'"
    # CSV has no lists: there the history is JSON text.
    if isinstance(history, str):
        history = parse_json(history, location) if history.strip() else None
    if not isinstance(history, list | None):
        raise DataError(f"{location} is {short(history)}, wanted a list of pairs of a question and its answer")
    turns: list[tuple[str, str]] = []
    for pair in history or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{location} holds {short(pair)}; wanted pairs of a question and its answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def _refuse_system(data: DataSection) -> None:
    # Without turns there is nothing to put a system prompt into; ignoring it would silently change what is trained on.
    if data.system:
        raise UsageError("got data.system, but the rows have no turns (text or token ids); remove it")
