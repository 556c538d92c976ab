"""Checks of answers, built from the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from demo_data.words import NAMES
from parley.evaluation.demo_scoring import Check


def one_of(right: str, candidates: Iterable[str], mentioned: Iterable[str] = (), never: Iterable[str] = ()) -> Check:
    """`right` and no other of the candidates, except those that the question mentions."""
    others = {word.lower() for word in candidates} - {word.lower() for word in mentioned} - {right.lower()}
    return Check(frozenset([right.lower()]), others=frozenset(others), never=tuple(phrase.lower() for phrase in never))


def name_check(right: str, not_name: str = "") -> Check:
    return one_of(right, [*NAMES, *([not_name] if not_name else [])])
