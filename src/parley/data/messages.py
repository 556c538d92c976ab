"""Turns as data sets write them, to the messages that chat templates take.

    {"from": "human", "value": "Hi"}                                    ShareGPT
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]}       OpenAI, in parts
    {"type": "ai", "data": {"content": "Hello"}}                        LangChain
    {"author": {"role": "user"}, "content": {"parts": ["Hi"]}}          ChatGPT's export

A turn becomes one message, or several where it holds tool results besides its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from parley.data.content_parts import Parts, reasoning_text
from parley.data.example import REASONING_KEYS, WEIGHT, WEIGHT_SPANS, Message
from parley.data.loss_weights import message_weight, weight_spans
from parley.data.tool_calls import parse_json, parse_tool_calls
from parley.data.values import short, text_of, type_name
from parley.data.written_numbers import parse_written
from parley.errors import DataError

# Names found in published data: prompter is OpenAssistant's, ipython Llama 3's, observation GLM's.
_SPEAKERS = {
    "system": "system context",
    "developer": "developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt model bot chatbot ai",
    "tool": "tool ipython function observation function_response tool_response tool_result",
    "function_call": "function_call tool_call",
}
ROLES = {name: role for role, names in _SPEAKERS.items() for name in names.split()}
"""What data sets call a speaker, in lower case, to the role that templates know. A `function_call` turn is a tool call
as JSON text, which becomes the assistant's."""

ROLE_KEYS = ("role", "from", "author", "speaker", "sender", "type")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "data")
_NESTED_CONTENT = ("content", "parts", "text")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_NO_NAMES: Mapping[str, str] = {}


def parse_messages(
    turns: Any,
    origin: str,
    column: str,
    *,
    keys: Mapping[str, str] = _NO_NAMES,
    roles: Mapping[str, str] = _NO_NAMES,
) -> list[Message]:
    """The messages of a list of turns, or of such a list as JSON text. Turns without text are dropped, unless they
    call tools, reason, or are a tool's result.

    keys: the data set's own names of "role" and "content". roles: its own names of roles, to those of ROLES.
    Raises DataError naming the row and the turn.
    """
    # CSV exports hold the list as JSON text.
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, f"{origin}: field {column!r}")
    if not isinstance(turns, list):
        raise DataError(f"{origin}: field {column!r} is {type_name(turns)}, wanted a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        location = f"{origin}: turn {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{location} is {type_name(turn)}, wanted an object with role and content")
        messages += _parse_turn(turn, location, keys, roles)
    return [message for message in messages if _has_content(message)]


def _parse_turn(
    turn: dict[str, Any], location: str, keys: Mapping[str, str], roles: Mapping[str, str]
) -> list[Message]:
    role_key = keys.get("role") or next((key for key in ROLE_KEYS if key in turn), "role")
    if turn.get(role_key) is None:
        found = short(", ".join(map(str, turn)), quoted=False) or "nothing"
        raise DataError(
            f"{location} has no role, it has {found}; wanted role and content: name yours in data.columns, such as "
            "{role: speaker, content: words}"
        )
    role = _role(turn.get(role_key), f"{location} has {role_key}", roles)
    content_key = keys.get("content") or _content_key(turn, role_key)
    # Null fields carry no meaning: Arrow adds every key of any turn to all turns.
    rest = {key: value for key, value in turn.items() if value is not None and key not in (role_key, content_key)}
    if media := [key for key in _MEDIA if rest.get(key)]:
        raise DataError(f"{location} has {media[0]!r}; Parley trains on text alone: the model would never see it")
    message: Message = {"role": role, "content": ""}
    results = _parse_content(turn.get(content_key), message, f"{location}: {content_key!r}")
    if role == "function_call":
        calls = parse_json(message["content"], f"{location}: {content_key!r}", parse_written)
        message |= {"role": "assistant", "content": ""}
        rest["tool_calls"] = calls if isinstance(calls, list) else [calls]
    _parse_keys(message, rest, location)
    _check_text_is_read(message, rest, turn, content_key, location)
    if rest.get("refusal") and not _has_content(message):  # OpenAI's, in place of a content
        raise DataError(
            f"{location} says its text under 'refusal'; set data.columns={{content: refusal}}, or remove it"
        )
    own = [message] if _has_content(message) or not results else []
    # Results first: Anthropic puts tool results and the user's next words into one user turn, and templates expect a
    # result directly after its call.
    return [*results, *own]


def _role(value: Any, location: str, roles: Mapping[str, str]) -> str:
    if isinstance(value, dict):  # ChatGPT's export: {"author": {"role": "user"}}
        value = value.get("role")
    if isinstance(value, str):
        name = roles.get(value, value).strip().lower()
        if name in ROLES:
            return ROLES[name]
    raise DataError(f"{location} {short(value)}, wanted one of {', '.join(ROLES)}; name yours in data.roles")


def _content_key(turn: dict[str, Any], role_key: str) -> str:
    """The first key of CONTENT_KEYS with something in it, else the first that is there."""
    # ShareGPT pairs `from` with `value`; other text keys of such a turn are annotations.
    if role_key == "from" and turn.get("value"):
        return "value"
    present = [key for key in CONTENT_KEYS if turn.get(key) is not None and key != role_key]
    return next((key for key in present if turn[key]), present[0] if present else "content")


def _parse_content(value: Any, message: Message, location: str) -> list[Message]:
    """Put text, reasoning, calls and loss weights of a turn's content into `message`; returns its tool results."""
    if isinstance(value, dict):  # LangChain's {"data": {"content": ...}}, ChatGPT's {"content": {"parts": [...]}}
        key = next((key for key in _NESTED_CONTENT if key in value), None)
        if key is None:
            found = short(", ".join(map(str, value)), quoted=False)
            raise DataError(f"{location} is an object with keys {found}; wanted text")
        value = value[key]
    if not isinstance(value, list):
        message["content"] = text_of(value, location)
        return []
    parts = Parts.of(value, location)
    parts.put_into(message)
    return parts.results


def _parse_keys(message: Message, rest: dict[str, Any], location: str) -> None:
    """Parse what a turn has besides its role and content: calls, reasoning, loss weights; the others as they are."""
    calls = parse_tool_calls(rest, location)
    for key in REASONING_KEYS:
        if key in rest:
            rest[key] = reasoning_text(rest[key], f"{location}: {key!r}")
    weight = message_weight(rest, location)
    spans = weight_spans(rest, message["content"], location)
    message |= {key: value for key, value in rest.items() if value not in ("", [], {}) or key == "name"}
    if calls:
        message["tool_calls"] = [*message.get("tool_calls", []), *calls]
    if weight is not None:
        # Flags of the turn and of its parts apply together.
        message[WEIGHT] = weight if WEIGHT not in message else weight * message[WEIGHT]
    if spans:
        message[WEIGHT_SPANS] = spans


def _check_text_is_read(
    message: Message, rest: dict[str, Any], turn: dict[str, Any], content_key: str, location: str
) -> None:
    """Refuse a turn whose text is under a key that is not read: it would be dropped silently."""
    if _has_content(message) or content_key in turn:
        return
    texts = [key for key, value in rest.items() if isinstance(value, str) and value.strip() and key not in _LABELS]
    if texts:
        key = short(texts[0], quoted=False)
        raise DataError(f"{location} has no content; if it is under {key!r}, set data.columns={{content: {key}}}")


_LABELS = ("name", "id", "tool_call_id", "type", "date", "timestamp")


def _has_content(message: Message) -> bool:
    if message["role"] == "tool" or message["content"].strip():
        return True
    return any(message.get(name) for name in ("tool_calls", *REASONING_KEYS))


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """`messages` with a system turn in front, unless they begin with one (or with a developer's, which is the same)."""
    if not system or not system.strip() or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def joined(parts: Iterable[str]) -> str:
    """Texts that are not blank, with a blank line between them."""
    return "\n\n".join(part for part in parts if part.strip())
