"""What can be written at a place in a run's settings: keys of the section, or the values that a key takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from parley.config_reference import SettingReference, section_models

MOST = 12  # completions that are shown
_KEY = re.compile(r"(\s*)([A-Za-z_]\w*)?")
_ENTRY = re.compile(r"(\s*)([A-Za-z_]\w*):\s+(\S*)")
_SECTION = re.compile(r"(\s*)([A-Za-z_]\w*):\s*(#.*)?")


@dataclass(frozen=True)
class Completion:
    """`insert` replaces the `replaces` characters before the cursor."""

    label: str
    insert: str
    replaces: int
    detail: str


def completions(text: str, line: int, column: int, references: Iterable[SettingReference]) -> list[Completion]:
    """Completions at the cursor, best first. `line` counts from 1, `column` from 0."""
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        return []
    before = lines[line - 1][:column]
    section = _section_of(lines[: line - 1], len(before) - len(before.lstrip(" ")))
    if (entry := _ENTRY.fullmatch(before)) is not None:
        return _values(".".join([*section, entry[2]]), entry[3], references)
    if (key := _KEY.fullmatch(before)) is not None:
        return _keys(section, key[2] or "", references)
    return []


def _section_of(lines: list[str], indent: int) -> list[str]:
    """The keys of the sections around a line of `indent` spaces that follows `lines`."""
    found: list[str] = []
    for line in reversed(lines):
        match = _SECTION.fullmatch(line)
        if match is not None and len(match[1]) < indent:
            found.insert(0, match[2])
            indent = len(match[1])
    return found


def _keys(section: list[str], start: str, references: Iterable[SettingReference]) -> list[Completion]:
    prefix = ".".join([*section, ""])
    names = {} if section else {name: (f"{name}:\n  ", "") for name in section_models()}
    for each in references:
        name = each.key.removeprefix(prefix)
        if each.key.startswith(prefix) and "." not in name:
            names.setdefault(name, (f"{name}: ", f"{each.type}, default {each.default}. {each.description}"))
    return [
        Completion(name, insert, len(start), detail)
        for name, (insert, detail) in sorted(names.items(), key=lambda item: _rank(item[0], start))
        if start.lower() in name.lower()
    ][:MOST]


def _values(key: str, start: str, references: Iterable[SettingReference]) -> list[Completion]:
    for each in references:
        if each.key == key:
            values = dict.fromkeys([*each.choices, each.default])
            return [Completion(value, value, len(start), each.description) for value in values if _begins(value, start)]
    return []


def _begins(value: str, start: str) -> bool:
    return value.startswith(start) and value != start


def _rank(name: str, start: str) -> tuple[bool, str]:
    return not name.startswith(start), name
