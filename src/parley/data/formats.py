"""The formats a data set may come in, recognised by their columns, and how each becomes an Example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parley.config import DataSection, unknown_key
from parley.data.conversation import Example, Message
from parley.data.files import Row, type_name
from parley.data.messages import conversation, text_of, tools_of
from parley.errors import DataError, UsageError

# Each format's columns under their canonical names; a name further right is another spelling of the same.
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages", "conversations", "conversation"),),
    "sharegpt": (("conversations", "conversation", "messages"),),
    "dolly": (("instruction",), ("response", "output")),
    "prompt-completion": (("prompt",), ("completion",)),
    "text": (("text",),),
}
_OPTIONAL: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("system", "system_prompt"), ("tools",)),
    "sharegpt": (("system", "system_prompt"), ("tools",)),
    "dolly": (("context", "input"), ("system", "system_prompt")),
    "prompt-completion": (("tools",),),
    "text": (),
}
_LABELS = {
    "messages": "messages",
    "sharegpt": "ShareGPT",
    "dolly": "Dolly",
    "prompt-completion": "prompt and completion",
    "text": "text",
}
_KNOWN = "instruction, response (context) / conversations / messages / prompt, completion / text"


@dataclass(frozen=True)
class Format:
    """A recognised format. `reason` is said out loud; `origin` is the row it was recognised by."""

    name: str
    reason: str
    origin: str
    data: DataSection

    def example(self, row: Row, origin: str) -> Example:
        """`row` as an Example.

        Turns without words are dropped, so that a row without an answer becomes an Example without one. Raises
        DataError naming the row: another format than the first row's, a field that is not text, an unknown role.
        """
        name = _shape(row, self.data, self.name)
        if name != self.name:
            seen = f"is {_LABELS[name]}" if name else f"has columns {_listed(row)}"
            expected = f"{self.origin} is {_LABELS[self.name]}"
            raise DataError(f"{origin}: {seen}, but {expected}; keep one format in a data set")
        return _BUILDERS[name](_Fields(row, origin, name, self.data), self.data)


def recognise(rows: Iterable[tuple[str, Row]], data: DataSection, where: str = "the data set") -> Format:
    """The format of the first of `rows` (origin and row) that shows one, or the one that `data.format` asks for.

    Raises UsageError for `data.columns` that no format knows, DataError for columns that are not there or not known.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{where}: is empty; wanted at least one row")
    _check_mapping(data, rows)
    undecided: Format | None = None
    for origin, row in rows:
        name = _shape(row, data, data.format if data.format != "auto" else None)
        if name is None or data.format not in ("auto", name):
            continue
        found = Format(name, _reason(name, row, data), origin, data)
        if name not in ("messages", "sharegpt") or _turns(name, row, data):
            return found
        undecided = undecided or found
    if undecided is not None:
        return undecided
    raise _unknown(*rows[0], data)


class _Fields:
    """A row's fields under canonical names."""

    def __init__(self, row: Row, origin: str, name: str, data: DataSection) -> None:
        self.row, self.origin = row, origin
        self.own = _own_columns(name, row, data)

    def value(self, canonical: str) -> Any:
        return self.row.get(self.own.get(canonical, canonical))

    def text(self, canonical: str) -> str:
        return text_of(self.value(canonical), f"{self.origin}: field {self.own.get(canonical, canonical)!r}")


def _dolly(fields: _Fields, data: DataSection) -> Example:
    question = "\n\n".join(part for part in (fields.text("context"), fields.text("instruction")) if part.strip())
    said = [("system", fields.text("system") or data.system or ""), ("user", question)]
    said.append(("assistant", fields.text("response")))
    messages: list[Message] = [{"role": role, "content": text} for role, text in said if text.strip()]
    return Example(fields.origin, messages=messages)


def _chat(fields: _Fields, data: DataSection) -> Example:
    own = "messages" if "messages" in fields.own else "conversations"
    turns = fields.value(own)
    messages = conversation(turns, fields.origin, fields.own[own])
    messages = _with_system(messages, fields.text("system") or data.system)
    return Example(fields.origin, messages=messages, tools=tools_of(fields.value("tools"), fields.origin))


def _prompt_completion(fields: _Fields, data: DataSection) -> Example:
    prompt, completion = fields.value("prompt"), fields.value("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        _no_system(data)
        return Example(fields.origin, prompt=fields.text("prompt"), completion=fields.text("completion"))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            f"{fields.origin}: 'prompt' is {type_name(prompt)} and 'completion' is {type_name(completion)}; "
            "wanted both as text or both as lists of messages"
        )
    asked = _with_system(conversation(prompt, fields.origin, fields.own["prompt"]), data.system)
    answered = conversation(completion, fields.origin, fields.own["completion"])
    tools = tools_of(fields.value("tools"), fields.origin)
    return Example(fields.origin, prompt=asked, completion=answered, tools=tools)


def _text(fields: _Fields, data: DataSection) -> Example:
    _no_system(data)
    return Example(fields.origin, text=fields.text("text"))


_BUILDERS = {
    "messages": _chat,
    "sharegpt": _chat,
    "dolly": _dolly,
    "prompt-completion": _prompt_completion,
    "text": _text,
}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    has_one = bool(messages) and messages[0]["role"] in ("system", "developer")
    if has_one or not system or not system.strip():
        return messages
    return [{"role": "system", "content": system}, *messages]


def _no_system(data: DataSection) -> None:
    if data.system:
        raise UsageError("got data.system, but the rows are plain text without turns; remove it")


def _own_columns(name: str, row: Row, data: DataSection) -> dict[str, str]:
    """Canonical name to the row's own, for the columns of format `name` that the row has (and does not leave null)."""
    own = {}
    for spellings in (*_COLUMNS[name], *_OPTIONAL[name]):
        mapped = [data.columns[spelling] for spelling in spellings if spelling in data.columns]
        candidates = [spelling for spelling in spellings if spelling not in data.columns]
        present = next((column for column in mapped + candidates if row.get(column) is not None), None)
        if present is not None:
            own[spellings[0]] = present
    return own


def _shape(row: Row, data: DataSection, expected: str | None = None) -> str | None:
    """The format `row` looks like, the `expected` one first; a row with some of its columns is taken for that too."""
    if expected and _fits(expected, row, data, expected):
        return expected
    for name in _COLUMNS:
        if data.columns.keys() <= set(_spellings(name)) and _fits(name, row, data, expected):
            return name
    if expected and any(spellings[0] in _own_columns(expected, row, data) for spellings in _COLUMNS[expected]):
        return expected
    return None


def _fits(name: str, row: Row, data: DataSection, expected: str | None) -> bool:
    """Whether `row` has all columns that format `name` needs, with turns of its kind."""
    own = _own_columns(name, row, data)
    if not all(spellings[0] in own for spellings in _COLUMNS[name]):
        return False
    if name not in ("messages", "sharegpt"):
        return True
    return _chat_kind(_turns(name, row, data), expected) == name


def _turns(name: str, row: Row, data: DataSection) -> Any:
    return row[_own_columns(name, row, data)[_COLUMNS[name][0][0]]]


def _chat_kind(turns: Any, expected: str | None) -> str:
    """Which of the two ways of writing turns this is; where they do not tell, the expected one or "messages"."""
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and ("from" in first) != ("role" in first):
        return "sharegpt" if "from" in first else "messages"
    return expected if expected in ("messages", "sharegpt") else "messages"


def _spellings(name: str) -> list[str]:
    return [spelling for spellings in (*_COLUMNS[name], *_OPTIONAL[name]) for spelling in spellings]


def _reason(name: str, row: Row, data: DataSection) -> str:
    own = _own_columns(name, row, data)
    columns = [column for column in row if column in own.values()]
    chosen = "as data.format says, " if data.format != "auto" else ""
    turns = {"sharegpt": ", turns with from and value", "messages": ", turns with role and content"}.get(name, "")
    return f"{_LABELS[name]} ({chosen}column{'s' * (len(columns) > 1)} {', '.join(columns)}{turns})"


def _check_mapping(data: DataSection, rows: list[tuple[str, Row]]) -> None:
    known = {spelling for name in _COLUMNS for spelling in _spellings(name)}
    for canonical, own in data.columns.items():
        if canonical not in known:
            raise unknown_key(canonical, known, "data.columns")
        if not any(own in row for _, row in rows):
            origin, row = rows[0]
            raise DataError(
                f"{origin}: data.columns asks for {canonical}: {own}, which is not there; it has columns {_listed(row)}"
            )


def _unknown(origin: str, row: Row, data: DataSection) -> DataError:
    wanted = _KNOWN
    if data.format != "auto":
        wanted = " and ".join(" or ".join(spellings) for spellings in _COLUMNS[data.format])
        wanted += ", as data.format says"
    return DataError(
        f"{origin}: got columns {_listed(row)}; wanted {wanted}; name yours in data.columns, "
        "for example {instruction: question, response: answer}"
    )


def _listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"
