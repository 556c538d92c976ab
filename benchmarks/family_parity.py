"""Every declared model family on each path against transformers: what the table of families in the README says.

    python benchmarks/family_parity.py            # runs the tests that the table counts, and prints it
    python benchmarks/family_parity.py --write    # and writes benchmarks/results/families.json and the pages

The figures are those of tests that ran and passed here, in float32 on tiny models of random weights, of every published
member of a family: the largest relative difference of the gradient, as one vector, from transformers, PEFT and
autograd; greedy tokens that are transformers' own; configurations whose GGUF file llama.cpp continues by the same 64
tokens; forms of export that the program which reads them agrees with. `make check` fails where a declaration has
changed since, or a page differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from family_table import RESULTS, declarations_digest, table  # noqa: E402

TESTS = (
    "tests/parity/test_published_shapes.py",
    "tests/train_step/test_captured_step.py::test_full_fine_tuning_of_any_family",
    "tests/exporting/test_gguf_families.py",
    "tests/exporting/test_family_exports.py",
)


class PassedTests:
    """A plugin of pytest: what passed tests have recorded, by family and name."""

    def __init__(self) -> None:
        self.recorded: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        facts = dict(report.user_properties)
        if report.when == "call" and report.outcome == "passed" and "family" in facts:
            for name, value in facts.items():
                self.recorded[str(facts["family"])][name].append(value)


def run_tests() -> dict[str, Any]:
    passed = PassedTests()
    ended = pytest.main(["-q", "-p", "no:cacheprovider", *(str(ROOT / test) for test in TESTS)], plugins=[passed])
    if ended != 0:
        sys.exit("a test failed: no table is written")
    families: dict[str, dict[str, Any]] = {}
    for model_type, facts in sorted(passed.recorded.items()):
        families[model_type] = {
            "members": len(facts["fused_gradient_error"]),
            "fused": max(facts["fused_gradient_error"], default=None),
            "captured": max(facts["captured_gradient_error"], default=None),
            "greedy_tokens": sum(facts["greedy_tokens"]),
            "gguf": len(facts["equal_tokens"]),
            "forms": min(facts["verified_forms"], default=0),
        }
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"declarations": declarations_digest(), "versions": packages, "families": families}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results and the pages")
    args = parser.parse_args()
    results = run_tests()
    print(table(results))
    if args.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, str(ROOT / "tools/build_docs.py")], check=True)


if __name__ == "__main__":
    main()
