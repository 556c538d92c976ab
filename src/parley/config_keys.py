"""The keys of settings: which are misspelled, and which hold a secret."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from parley.errors import UsageError
from parley.setting_names import setting_named
from parley.text import shorten_middle

_SECRET_KEY = re.compile(r"(^|_)(token|api_key|password|secret|credentials?)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
LEAST_LIKENESS = 0.5  # of a misspelled key; below it a suggestion is a guess
LONGEST_NAME = 255  # characters of a misspelled key that are compared


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """The name in `known` most like `wrong`, by spelling or by initials (lr); None where none is like it."""
    wrong = wrong[:LONGEST_NAME]  # SequenceMatcher takes quadratic time

    def likeness(name: str) -> float:
        if wrong == "".join(word[:1] for word in name.split("_")):
            return 1.0
        return difflib.SequenceMatcher(None, wrong, name).ratio()

    best = max(sorted(known), key=likeness)  # sorted, so that a tie has one answer
    return best if likeness(best) > LEAST_LIKENESS else None


def unknown_key(key: str, known: Iterable[str], where: str) -> UsageError:
    """The error for an unknown key, naming the most similar known one."""
    known = set(known)
    section, _, name = key.rpartition(".")
    similar = nearest(name, known)
    if (setting := setting_named(name, section and f"{section}.")) and setting.rpartition(".")[2] != name:
        advice = f"here it is {setting}"
    elif similar is None:
        advice = f"it knows {', '.join(sorted(known))}" if len(known) <= 20 else "no key is spelled like it"
    else:
        advice = f"did you mean {similar!r}?"
    return UsageError(f"unknown key {shorten_middle(key, 80)!r} in {where}; {advice}")


def is_secret(key: str) -> bool:
    """Whether a setting of this name holds a credential: hub_token, api_key, password ... (pad_token does not)."""
    return _SECRET_KEY.search(key) is not None and key not in ("eos_token", "pad_token")


def without_secrets(value: Any) -> Any:
    """`value` without the entries whose key `is_secret`, and with the hub's tokens in other texts masked."""
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items() if not is_secret(str(key))}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return _HUB_TOKEN.sub("hf_***", value) if isinstance(value, str) else value
