"""How even the steps of a run are, from the JSON lines of `parley bench --output`.

    parley bench mix --model MODEL --data alpaca_mix.jsonl --output result.jsonl
    python benchmarks/step_spread.py result.jsonl

Conversations vary in length, so steps vary in tokens: beside the mean over the median, in ms, it prints the same of the
tokens, a line fitted to ms by tokens, and each step's ms over what its tokens take on that line. Steps that
captured a graph or take more than 1.3 times their tokens' time are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SKIP, FIRST, SLOW = 10, 30, 1.3


def spread(report: dict[str, Any]) -> dict[str, Any]:
    """Figures of one report. Step i is from the end of step i - 1 to its own end, so that the first has none."""
    ms_N = np.array(report["step_ms"])
    tokens_N = np.array(report["step_tokens"][1 : len(ms_N) + 1])
    late = slice(min(SKIP, len(ms_N) // 2), None)
    # The median of ms in four groups by tokens, so that single slow steps do not tilt the line.
    groups = np.array_split(np.argsort(tokens_N[late]), 4)
    points = [(np.median(tokens_N[late][group]), np.median(ms_N[late][group])) for group in groups]
    slope, constant = np.polyfit(*zip(*points, strict=True), 1)
    expected_N = constant + slope * tokens_N
    ratio_N = ms_N / expected_N
    median = float(np.median(ms_N[late]))
    return {
        "job": report["job"],
        "median ms": round(median, 2),
        "mean ms": round(float(ms_N[late].mean()), 2),
        "mean / median": round(float(ms_N[late].mean()) / median, 3),
        "the same of tokens": round(float(tokens_N[late].mean() / np.median(tokens_N[late])), 3),
        "median tokens": int(np.median(tokens_N[late])),
        "ms by tokens": f"{constant:.1f} + {1000 * slope:.2f} per thousand",
        "mean / mean of that line": round(float(ms_N[late].mean() / expected_N[late].mean()), 3),
        f"worst of steps 2 to {FIRST}, of the median": round(float(ms_N[: FIRST - 1].max()) / median, 2),
        "the same, of the line": round(float(ratio_N[: FIRST - 1].max()), 2),
        "graphs": report["graphs"],
        "slow steps (step: ms, tokens, of the line)": {
            i + 2: [float(ms_N[i]), int(tokens_N[i]), round(float(ratio_N[i]), 2)]
            for i in range(len(ms_N))
            if ratio_N[i] > SLOW or i + 2 in report["graphs"]["at_steps"]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--first", type=int, default=0, help="also print the ms and tokens of so many first steps")
    args = parser.parse_args()
    for path in args.results:
        for line in path.read_text(encoding="utf-8").splitlines():
            report = json.loads(line)
            if len(report["step_ms"]) < FIRST:
                print(f"{path}: {report['job']} has {len(report['step_ms'])} steps, wanted {FIRST}", file=sys.stderr)
                continue
            for name, value in spread(report).items():
                print(f"{name}: {value}")
            if args.first:
                pairs = zip(report["step_ms"], report["step_tokens"][1:], strict=False)
                print("first steps:", [f"{ms:.0f}/{tokens}" for ms, tokens in list(pairs)[: args.first]])


if __name__ == "__main__":
    main()
