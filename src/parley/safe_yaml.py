"""Read YAML that a stranger may have written: bounded in size, depth and expansion, and data only.

The document is checked as a stream of parser events before any object is made. PyYAML's composer recurses (a deep file
ends in RecursionError), aliases multiply (a "billion laughs" file of 1 kB has 10^9 nodes), and explicit tags reach
constructors that raise whatever they like.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from parley.errors import ParleyError, UsageError, one_line

MAX_BYTES = 256 * 1024  # settings of a run take 3 KiB
MAX_DEPTH = 30
MAX_NODES = 20_000  # after aliases are expanded

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads numbers and booleans as YAML 1.2 does.

    YAML 1.1 reads 1e-4 as text, and the `no` of `save_strategy: no` as False.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if (twice := repeated_key(node)) is not None:
            raise yaml.YAMLError(f"key {twice.value!r} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def repeated_key(node: yaml.MappingNode) -> yaml.ScalarNode | None:
    """The second occurrence of a key in `node`; None where each key is there once."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                return key
            seen.add(key.value)
    return None


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of the document in `text`, with their lines; None for an empty one. Raises yaml.YAMLError."""
    _check_events(text)
    return yaml.compose(text, _Loader)


def load_yaml(text: str, where: str, kind: type[ParleyError] = UsageError) -> Any:
    """The document in `text`. Raises `kind` in one line that begins with `where`."""
    try:
        _check_events(text)
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: a date of month 13, an int of 5,000 digits
        raise kind(f"{where}: not valid YAML ({one_line(error)})") from None


def read_yaml_file(path: Path, kind: type[ParleyError] = UsageError) -> Any:
    """The document in the file `path`, which exists. Raises `kind` in one line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "binary, not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise kind(f"{path}: not valid YAML ({reason})") from None
    if len(content) > MAX_BYTES:
        raise kind(f"{path}: over {MAX_BYTES // 1024} KiB, too large for the settings of a run; is it another file?")
    return load_yaml(text, str(path), kind)


def _check_events(text: str) -> None:
    """Raises YAMLError where the document exceeds a limit, contains itself by an alias, or has explicit tags."""
    sizes: dict[str, int] = {}  # nodes behind each finished anchor
    open_nodes: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor} has no finished anchor")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            if event.tag not in (None, "!"):
                raise yaml.YAMLError(f"tag {event.tag} is not read; write the value without it")
            nodes += 1
            if isinstance(event, yaml.ScalarEvent):
                if event.anchor:
                    sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, nodes - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes_before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - nodes_before
        if nodes > MAX_NODES:
            raise yaml.YAMLError(f"over {MAX_NODES:,} values once its aliases are expanded")
        if len(open_nodes) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested over {MAX_DEPTH} deep")
