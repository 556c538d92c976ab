"""Serve what was trained: a run's golden conversations, rendered anew, must give the token ids stored at training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parley.data.render import render, render_prompt
from parley.errors import ParleyError, RunError

AROUND = 6  # tokens shown on each side of the first difference


@dataclass(frozen=True)
class Difference:
    """Where the ids of one golden conversation first differ, and both sides around there: (id, token) each."""

    conversation: int
    place: int
    trained: list[tuple[int, str]]
    served: list[tuple[int, str]]

    def lines(self) -> list[str]:
        return [
            f"golden conversation {self.conversation} differs from token {self.place} on",
            f"  trained: {_line(self.trained)}",
            f"  served:  {_line(self.served)}",
        ]


def check_golden(path: Path, tokenizer: Any) -> Difference | None:
    """The first difference between the ids in `path` (a run's golden.json) and those of `tokenizer`, None for none.

    Raises RunError where the file is missing or is not what training writes; ParleyError's kinds where the tokenizer
    cannot render at all what was trained.
    """
    for number, (messages, trained, prompt) in enumerate(_read(path), 1):
        try:
            pairs = [
                (trained, render(tokenizer, messages).input_ids),
                (prompt, render_prompt(tokenizer, messages[:-1])),
            ]
        except ParleyError as error:
            raise RunError(f"golden conversation {number} cannot be rendered as it was trained: {error}") from error
        for before, now in pairs:
            if before != now:
                return _difference(tokenizer, number, before, now)
    return None


def _read(path: Path) -> list[tuple[Any, list[int], list[int]]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [(entry["messages"], entry["input_ids"], entry["prompt_ids"]) for entry in stored]
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}), so nothing shows what was trained; restore it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path}: not what training writes; restore it, or train again") from None


def _difference(tokenizer: Any, number: int, trained: list[int], served: list[int]) -> Difference:
    same = zip(trained, served, strict=False)
    place = next((at for at, (one, other) in enumerate(same) if one != other), min(len(trained), len(served)))
    window = slice(max(place - AROUND, 0), place + AROUND)

    def named(ids: list[int]) -> list[tuple[int, str]]:
        return [(token, tokenizer.decode([token])) for token in ids[window]]

    return Difference(number, place, named(trained), named(served))


def _line(side: list[tuple[int, str]]) -> str:
    return " ".join(f"{token}:{text!r}" for token, text in side) or "(ends here)"
