"""Checks that a run is served with the token ids it was trained with, on its golden conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parley.data.render import render, render_prompt
from parley.errors import ParleyError, RunError

CONTEXT_TOKENS = 6  # shown on each side of the first difference


@dataclass(frozen=True)
class GoldenMismatch:
    """The first difference of one golden conversation.

    Attributes:
        conversation: its number, from 1.
        position: index of the first token that differs.
        trained, served: (id, text) of the tokens around it.
    """

    conversation: int
    position: int
    trained: list[tuple[int, str]]
    served: list[tuple[int, str]]

    def lines(self) -> list[str]:
        return [
            f"golden conversation {self.conversation} differs from token {self.position} on",
            f"  trained: {_format_tokens(self.trained)}",
            f"  served:  {_format_tokens(self.served)}",
        ]


def check_golden(path: Path, tokenizer: Any) -> GoldenMismatch | None:
    """The first difference between the ids in `path` (a run's golden.json) and those of `tokenizer`; None without one.

    Raises RunError where the file is missing or malformed, or the tokenizer cannot render a conversation.
    """
    for number, (messages, trained, prompt) in enumerate(_read(path), 1):
        try:
            pairs = [
                (trained, render(tokenizer, messages).input_ids),
                (prompt, render_prompt(tokenizer, messages[:-1])),
            ]
        except ParleyError as error:
            raise RunError(f"golden conversation {number} cannot be rendered as it was trained: {error}") from error
        for stored, rendered in pairs:
            if stored != rendered:
                return _mismatch(tokenizer, number, stored, rendered)
    return None


def _read(path: Path) -> list[tuple[Any, list[int], list[int]]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [(entry["messages"], entry["input_ids"], entry["prompt_ids"]) for entry in stored]
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}); restore it, as it holds the token ids the run was trained with"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not what training writes; restore it, or train again") from None


def _mismatch(tokenizer: Any, number: int, trained: list[int], served: list[int]) -> GoldenMismatch:
    pairs = enumerate(zip(trained, served, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(trained), len(served)))
    window = slice(max(position - CONTEXT_TOKENS, 0), position + CONTEXT_TOKENS)

    def with_text(ids: list[int]) -> list[tuple[int, str]]:
        return [(token, tokenizer.decode([token])) for token in ids[window]]

    return GoldenMismatch(number, position, with_text(trained), with_text(served))


def _format_tokens(tokens: list[tuple[int, str]]) -> str:
    return " ".join(f"{token}:{text!r}" for token, text in tokens) or "(ends here)"
