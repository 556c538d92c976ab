"""Files of prompts: a prompt a line, or JSON rows of a prompt or of messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parley.data.conversation import Message
from parley.data.files import ORIGIN, kind_of, read_files
from parley.data.messages import conversation, text_of
from parley.errors import DataError, UsageError


@dataclass(frozen=True)
class PromptRow:
    """One row: what it said, to be told with its answer, the messages it asks, and where it stands."""

    row: dict[str, Any]
    messages: list[Message]
    origin: str


def read_prompts(path: Path) -> list[PromptRow]:
    """The prompts of a .txt (one a line, empty lines left out), .jsonl or .json file.

    JSON rows have `prompt`, a text, or `messages`; what they hold besides is kept. Raises UsageError for a file that is
    not there or of another kind, DataError naming the line of a row that cannot be asked.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a .txt, .jsonl or .json file of prompts")
    if path.suffix.lower() == ".txt":
        asked = _lines(path)
    elif kind_of(path) in (".json", ".jsonl"):
        asked = [_asked(row, row.pop(ORIGIN)) for row in read_files([str(path)])]
    else:
        raise UsageError(f"{path}: wanted a .txt file with a prompt a line, or .jsonl or .json rows")
    if not asked:
        raise DataError(f"{path}: is empty; wanted at least one prompt")
    return asked


def _lines(path: Path) -> list[PromptRow]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} line {line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return [
        PromptRow({"prompt": line}, [{"role": "user", "content": line}], f"{path.name} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _asked(row: dict[str, Any], origin: str) -> PromptRow:
    if "messages" in row:
        messages = conversation(row["messages"], origin, "messages")
        if not messages or messages[-1]["role"] == "assistant":
            raise DataError(f"{origin}: the messages end with the assistant, so nothing is asked; end with the user")
        return PromptRow(row, messages, origin)
    if "prompt" not in row:
        raise DataError(f"{origin}: has {', '.join(row) or 'no keys'}; wanted prompt or messages")
    text = text_of(row["prompt"], f"{origin}: field 'prompt'")
    if not text.strip():
        raise DataError(f"{origin}: the prompt is empty; write one, or remove the row")
    return PromptRow(row, [{"role": "user", "content": text}], origin)
