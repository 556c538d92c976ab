"""Change one setting in YAML text and keep the rest as its author wrote it: order, comments, blank lines."""

from __future__ import annotations

from typing import Any

import yaml

from parley.errors import UsageError
from parley.safe_yaml import compose_yaml, load_yaml

SHORTHANDS = {"model": "name", "data": "source"}
"""Sections that may be written as one value, and the key that it stands for."""
INDENT = "  "

Entry = tuple[yaml.ScalarNode, yaml.Node]


def setting(text: str, key: str) -> Any:
    """The value of the dotted `key` in `text`; None where it is not there. Raises UsageError for what is not YAML."""
    value: Any = load_yaml(text, "settings")
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(value, str) and depth == 1:
            value = {SHORTHANDS.get(parts[0], ""): value}
        value = value.get(part) if isinstance(value, dict) else None
    return value


def set_setting(text: str, key: str, value: Any) -> str:
    """`text` with the dotted `key` set to `value`, or without it where `value` is None.

    Raises UsageError for a text that is not a YAML mapping, or has an alias there.
    """
    parts = key.split(".")
    path = _path(text, parts)
    if value is None:
        return _removed(text, parts, path) if len(path) == len(parts) else text
    if len(path) == len(parts):
        return _replaced(text, path[-1], _flow(value))
    if not path:
        head = text if not text or text.endswith("\n") else text + "\n"
        return head + _block(parts, value)
    return _inserted(text, parts, path, value)


def _path(text: str, parts: list[str]) -> list[Entry]:
    """The entries of `text` that lead to the key `parts`, as far as they are there."""
    try:
        node = compose_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"not valid YAML ({error}); correct it first") from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError("the settings are no YAML mapping; wanted keys such as model: and data:")
    found: list[Entry] = []
    for part in parts:
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next((e for e in node.value if isinstance(e[0], yaml.ScalarNode) and e[0].value == part), None)
        if entry is None:
            break
        if entry[1].start_mark.index < entry[0].end_mark.index:  # an alias's node is where its anchor is
            raise UsageError(f"line {entry[0].start_mark.line + 1}: {part} is an alias; change it by hand")
        found.append(entry)
        node = entry[1]
    return found


def _replaced(text: str, entry: Entry, value: str) -> str:
    start, end = entry[1].start_mark.index, _content_end(entry[1])
    space = " " if text[start - 1] == ":" else ""
    return text[:start] + space + value + text[end:]


def _inserted(text: str, parts: list[str], path: list[Entry], value: Any) -> str:
    """`text` with the rest of the key `parts` put into the innermost section of `path`."""
    key, section = path[-1]
    rest = parts[len(path) :]
    if not isinstance(section, yaml.MappingNode):
        shorthand = SHORTHANDS.get(parts[0]) if len(path) == 1 else None
        if rest == [shorthand] and isinstance(value, str):
            return _replaced(text, path[-1], _flow(value))
        written = text[section.start_mark.index : section.end_mark.index]
        kept = {shorthand: load_yaml(written, "settings")} if shorthand and written and rest[0] != shorthand else {}
        indent = INDENT * (len(path) - 1) + INDENT
        lines = [f"{indent}{name}: {_flow(old)}\n" for name, old in kept.items()]
        block = "".join(lines) + _block(rest, value, indent)
        after = text[section.end_mark.index :]
        return text[: key.end_mark.index] + ":\n" + block.rstrip("\n") + after
    inline = _inline(rest, value)
    if section.flow_style:
        end = section.end_mark.index - 1
        return text[:end] + (", " if section.value else "") + inline + text[end:]
    indent = " " * section.start_mark.column
    end = _line_end(text, _content_end(section))
    return text[:end] + f"\n{indent}{inline}" + text[end:]


def _removed(text: str, parts: list[str], path: list[Entry]) -> str:
    """`text` without the last entry of `path`, and without the sections that are empty then."""
    parent = path[-2][1] if len(path) > 1 else None
    if isinstance(parent, yaml.MappingNode) and len(parent.value) == 1:
        return _removed(text, parts[:-1], path[:-1])
    key, value = path[-1]
    if isinstance(parent, yaml.MappingNode) and parent.flow_style:
        entries = {name.value: text[item.start_mark.index : item.end_mark.index] for name, item in parent.value}
        kept = ", ".join(f"{name}: {item}" for name, item in entries.items() if name != key.value)
        return text[: parent.start_mark.index] + "{" + kept + "}" + text[parent.end_mark.index :]
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    return text[:start] + text[_line_end(text, max(_content_end(value), key.end_mark.index)) + 1 :]


def _content_end(node: yaml.Node) -> int:
    """Index behind the last character of `node`; the mark of a block collection is that of the next token."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    if isinstance(last, tuple):
        return max(_content_end(last[1]), last[0].end_mark.index)
    return _content_end(last)


def _line_end(text: str, index: int) -> int:
    """Index of the end of the line that `index` is in; of the line before where `index` begins one (block scalars)."""
    if index and text[index - 1] == "\n":
        return index - 1
    end = text.find("\n", index)
    return len(text) if end < 0 else end


def _block(parts: list[str], value: Any, indent: str = "") -> str:
    lines = [f"{indent}{INDENT * depth}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(lines) + f" {_flow(value)}\n"


def _inline(parts: list[str], value: Any) -> str:
    for part in reversed(parts[1:]):
        value = {part: value}
    return f"{parts[0]}: {_flow(value)}"


def _flow(value: Any) -> str:
    """`value` as it can be written anywhere, also inside of {} and []."""
    listed = yaml.safe_dump([value], default_flow_style=True, width=10_000, allow_unicode=True)
    return listed.strip().removeprefix("[").removesuffix("]")
