"""Time and peak memory of reading a large data set: `parley train --dry-run` and `parley inspect`.

    python benchmarks/data_rate.py [--rows 200000] [--model MODEL] [--kind jsonl|csv|messages]

Writes rows of about 450 bytes (200,000 of them are 90 MB), the same for a seed, into a temporary folder, runs both
commands in a process each, and prints one line of JSON a command: seconds, seconds of all cores (on a busy machine the
better figure), and the largest resident set in GiB.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from parley.config import DEMO_MODEL
from parley.units import GIB

TEXT = (
    "the of and to in a is that for it as was with be by on not he this are or his from at which but have an they you "
    "were her she all would there been their we him when who will no more if out so said what up its about into than "
    "them can only other new some could time these two may then do first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because each"
)
WORDS = TEXT.split()


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Instructions of 8 to 30 words, every third with a context, and responses of 10 to 90 words."""
    rng = random.Random(seed)

    def text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most))).capitalize()

    for number in range(count):
        context = text(40, 60) + "." if number % 3 == 0 else ""
        yield {"instruction": text(8, 30) + "?", "context": context, "response": text(10, 90) + "."}


def write(path: Path, count: int, kind: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["instruction", "context", "response"])
            writer.writeheader()
            writer.writerows(rows(count))
            return
        for row in rows(count):
            turns = [("user", row["instruction"]), ("assistant", row["response"])]
            messages = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(messages if kind == "messages" else row) + "\n")


def measure(name: str, *arguments: str) -> None:
    """Run a command of parley and print what it took."""
    start = perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "parley.cli.main", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = perf_counter() - start
    assert status == 0, f"{name} ended with status {status}"
    figures = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    peak = usage.ru_maxrss * 1024 / GIB
    rounded = {figure: round(value, 1) for figure, value in figures.items()}
    print(json.dumps({"command": name, **rounded, "peak_gib": round(peak, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", default=DEMO_MODEL, help="hub id or folder; its tokenizer alone is loaded")
    parser.add_argument("--kind", choices=["jsonl", "csv", "messages"], default="jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("rows.csv" if arguments.kind == "csv" else "rows.jsonl")
        write(path, arguments.rows, arguments.kind)
        print(json.dumps({"rows": arguments.rows, "megabytes": round(path.stat().st_size / 1e6)}))
        data, output = str(path), str(Path(folder) / "run")
        measure("train --dry-run", "train", "--model", arguments.model, "--data", data, "--output", output, "--dry-run")
        measure("inspect --row 1", "inspect", data, "--model", arguments.model, "--row", "1")


if __name__ == "__main__":
    main()
