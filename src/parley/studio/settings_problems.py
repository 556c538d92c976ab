"""Settings as YAML text that a person edits: its errors, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from parley.config import setting_errors
from parley.errors import ParleyError, UsageError, one_line
from parley.safe_yaml import MAX_BYTES, compose_yaml, load_yaml, repeated_key

_SETTING = re.compile(r"\b[a-z_]+(?:\.[A-Za-z_0-9]+)+|^[a-z_]+(?=:)")


@dataclass(frozen=True)
class Problem:
    """One error; `line` counts from 1, and is None where no single line is wrong."""

    message: str
    line: int | None = None


def problems(text: str) -> list[Problem]:
    """What `parley train` would refuse in `text` before it imports a library, all of it, in the order of the lines."""
    try:
        node = _checked_nodes(text)
        if node is None:
            return []
        values = load_yaml(text, "settings")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return [Problem(error.problem or one_line(error), None if mark is None else mark.line + 1)]
    except (yaml.YAMLError, UsageError, ValueError) as error:
        return [Problem(one_line(error))]
    if not isinstance(values, dict):
        return [Problem(f"got a {type(values).__name__}, wanted keys such as model: and data:", 1)]
    lines = key_lines(text)
    found = [Problem(_with_path(path, message), line_of(path, lines)) for path, message in setting_errors(values)]
    return sorted(found, key=lambda problem: problem.line or 0)


def problem_of(error: ParleyError, text: str) -> Problem:
    """A later error of the command (of a plan, of a start) with the line of the setting that it names, if any."""
    lines = key_lines(text)
    named = (line_of(match[0], lines) for match in _SETTING.finditer(str(error)))
    return Problem(str(error), next((line for line in named if line is not None), None))


def key_lines(text: str) -> dict[str, int]:
    """The line of each key of the mapping in `text`, by its dotted path; empty where it is not YAML."""
    try:
        node = compose_yaml(text)
    except (yaml.YAMLError, ValueError):
        return {}
    return {path: key.start_mark.line + 1 for path, key in _keys(node)}


def line_of(path: str, lines: dict[str, int]) -> int | None:
    """The line of the setting `path`, or of the nearest section around it that the text has."""
    parts = path.split(".")
    found = (lines.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
    return next((line for line in found if line is not None), None)


def _checked_nodes(text: str) -> yaml.Node | None:
    """The nodes of `text`. Raises MarkedYAMLError for a key that is there twice, and UsageError for a text too long."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise UsageError(f"over {MAX_BYTES // 1024} KiB, too large for the settings of a run")
    node = compose_yaml(text)
    for mapping in _mappings(node):
        if (twice := repeated_key(mapping)) is not None:
            raise yaml.MarkedYAMLError(problem=f"key {twice.value!r} is there twice", problem_mark=twice.start_mark)
    return node


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield prefix + key.value, key
                yield from _keys(value, f"{prefix}{key.value}.")


def _with_path(path: str, message: str) -> str:
    return f"{path}: {message}" if path and path not in message else message
