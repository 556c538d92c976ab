"""Two runs side by side: settings, data and results, as `parley runs diff` shows them."""

from __future__ import annotations

from typing import Any

from parley.training.run_summary import RunSummary

Sections = dict[str, dict[str, tuple[Any, Any]]]
MISSING = None
# What differs between any two runs, and says nothing about them.
UNTOLD_SETTINGS = frozenset({"output"})
RESULTS = ("before", "after", "resources", "kept_step")
NO_RESULT = frozenset({"stages"})


def diff_runs(a: RunSummary, b: RunSummary, *, everything: bool = False) -> Sections:
    """For each section the values of both runs by name; without `everything`, those that differ.

    Names of nested values are joined by dots. None: the run does not have it.
    """
    sections = {
        "settings": (_settings(a), _settings(b)),
        "data": (_flat(a.report.get("data_summary")), _flat(b.report.get("data_summary"))),
        "results": (_results(a), _results(b)),
        "versions": (_flat(a.report.get("versions")), _flat(b.report.get("versions"))),
    }
    found: Sections = {}
    for title, (ours, theirs) in sections.items():
        pairs = {name: (ours.get(name, MISSING), theirs.get(name, MISSING)) for name in dict.fromkeys([*ours, *theirs])}
        found[title] = {name: pair for name, pair in pairs.items() if everything or pair[0] != pair[1]}
    return found


def _settings(run: RunSummary) -> dict[str, Any]:
    return {name: value for name, value in _flat(run.settings).items() if name not in UNTOLD_SETTINGS}


def _results(run: RunSummary) -> dict[str, Any]:
    reported = {name: run.report.get(name) for name in RESULTS}
    own = {"state": run.state, "step": run.step, "loss": run.loss, "size": run.size}
    found = own | {name: value for name, value in _flat(reported).items() if not NO_RESULT & set(name.split("."))}
    return {name: value for name, value in found.items() if value is not None}


def _flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Leaves of nested mappings by their dotted names; lists are leaves."""
    if not isinstance(value, dict) or depth > 20:
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    return found if found or not prefix else {prefix: {}}
