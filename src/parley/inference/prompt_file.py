"""Files of prompts: a prompt a line, or JSON rows of a prompt or of messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parley.data.columns import listed
from parley.data.example import Message
from parley.data.files import ORIGIN, kind_of, read_files
from parley.data.messages import parse_messages
from parley.data.values import text_of
from parley.errors import DataError, UsageError

_KINDS = (".txt", ".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class PromptRow:
    """One row: its own columns, which are written with its answer, its messages, and its place in the file."""

    row: dict[str, Any]
    messages: list[Message]
    origin: str


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a .txt (one a line, blank lines left out), .jsonl, .ndjson or .json file, compressed or not.

    JSON rows have `prompt`, a text, or `messages`; their other columns are kept. Raises UsageError for a file that is
    missing or of another kind, DataError naming the line of a row that holds no prompt.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a .txt, .jsonl or .json file of prompts")
    kind = kind_of(path)
    if kind not in _KINDS:
        raise UsageError(f"{path}: wanted a .txt file with a prompt a line, or .jsonl or .json rows")
    rows = [(row, row.pop(ORIGIN)) for row in read_files([str(path)])]
    if kind == ".txt":
        rows = [({"prompt": row["text"]}, origin) for row, origin in rows]
    return [_prompt_row(row, origin) for row, origin in rows]


def _prompt_row(row: dict[str, Any], origin: str) -> PromptRow:
    if "messages" in row:
        messages = parse_messages(row["messages"], origin, "messages")
        if not messages or messages[-1]["role"] == "assistant":
            raise DataError(f"{origin}: the messages end with the assistant, so there is no prompt; end with the user")
        return PromptRow(row, messages, origin)
    if "prompt" not in row:
        raise DataError(f"{origin}: has {listed(row)}; wanted prompt or messages")
    text = text_of(row["prompt"], f"{origin}: field 'prompt'")
    if not text.strip():
        raise DataError(f"{origin}: the prompt is empty; write one, or remove the row")
    return PromptRow(row, [{"role": "user", "content": text}], origin)
