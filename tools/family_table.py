"""The tables of model families in README and docs, from the declarations and the tests that family_parity.py ran."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from parley.exporting.registry import EXPORTERS
from parley.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/families.json"
COMMAND = "python benchmarks/family_parity.py --write"
START, OTHERS_START, END = "<!-- families -->\n", "<!-- other families -->\n", "<!-- end -->"


def declarations_digest() -> str:
    """Changes with any declaration of a family."""
    folder = ROOT / "src/parley/models/families"
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def table(results: dict[str, Any]) -> str:
    """A line for each declared family."""
    lines = [
        "| family | fused step | captured path | decoder | GGUF | exports |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model_type, family in FAMILIES.items():
        facts = results["families"][model_type]
        cells = (
            family.members, f"{facts['fused']:.0e}", f"{facts['captured']:.0e}", f"{facts['greedy_tokens']:,} tokens",
            f"{facts['gguf']} x 64 tokens", f"{facts['forms']} of {len(EXPORTERS)} forms",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def other_families(results: dict[str, Any]) -> str:
    """One sentence on the families without a declaration that the captured path was tested with."""
    captured = {name: facts["captured"] for name, facts in results["families"].items() if name not in FAMILIES}
    listed = ", ".join(f"{name} {error:.0e}" for name, error in captured.items() if error is not None)
    return f"Tested there, every weight trained, with the difference of the gradient: {listed}.\n"


def with_tables(page: str) -> str:
    """`page` with its tables written anew. Raises SystemExit where a declaration has no results, or older ones."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    lacking = [name for name in FAMILIES if results["families"].get(name, {}).get("fused") is None]
    if lacking or results["declarations"] != declarations_digest():
        raise SystemExit(f"the table of families is older than {', '.join(lacking) or 'a declaration'}; run {COMMAND}")
    for start, text in ((START, table(results)), (OTHERS_START, other_families(results))):
        if start in page:
            head, _, tail = page.partition(start)
            page = f"{head}{start}{text}{END}{tail.partition(END)[2]}"
    return page
