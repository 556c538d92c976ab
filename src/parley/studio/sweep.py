"""A sweep: a run for each combination of a few values of a few settings."""

from __future__ import annotations

from itertools import product
from typing import Any

from parley.errors import UsageError
from parley.safe_yaml import load_yaml
from parley.studio.settings_edit import set_setting

MOST_RUNS = 64


def sweep(text: str, values: dict[str, str]) -> list[tuple[str, str]]:
    """The settings `text` with each combination, each with a name that says it.

    values: by dotted key, its values as YAML with commas between them: "1e-4, 2e-4". Raises UsageError.
    """
    parsed = {key.strip(): _values(key, written) for key, written in values.items() if key.strip() or written.strip()}
    if not parsed:
        raise UsageError("nothing to vary; name a setting, such as training.learning_rate, and its values")
    count = 1
    for listed in parsed.values():
        count *= len(listed)
    if count > MOST_RUNS:
        raise UsageError(f"got {count:,} combinations, wanted {MOST_RUNS} at most; leave some values out")
    found = []
    for combination in product(*parsed.values()):
        changed, name = text, []
        for key, value in zip(parsed, combination, strict=True):
            changed = set_setting(changed, key, value)
            name.append(f"{key.rpartition('.')[2]}-{value}")
        found.append(("-".join(name), changed))
    return found


def _values(key: str, written: str) -> list[Any]:
    listed = load_yaml(f"[{written}]", f"the values of {key or 'a setting without a name'}")
    if "." not in key.strip(". "):
        raise UsageError(f"got {key or 'no name'}, wanted a setting by its dotted name, such as training.learning_rate")
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"{key}: got no value; wanted some with commas between them, such as 1e-4, 2e-4")
    if any(isinstance(value, dict | list) for value in listed):
        raise UsageError(f"{key}: got a list or mapping among its values; a sweep is over single values")
    if len({repr(value) for value in listed}) < len(listed):
        raise UsageError(f"{key}: a value is there twice")
    return listed
