"""CPU time and peak memory of `parley inspect DATA`, and of the parts of the near-duplicate search.

    python benchmarks/data_doctor.py [--rows 100000] [--model MODEL] [--data FILE] [--libraries]

Writes rows of about 450 bytes with one in a hundred repeated, exactly or nearly, into a temporary folder. --data takes
the rows of a JSON-lines file instead, again and again with their words rotated, so that lengths are real. Runs the
command on one core in its own process and prints a line of JSON: CPU seconds, seconds, and the largest resident set
in MiB. --model counts tokens as well. --libraries compares MinHash libraries on the same word trigrams, in microseconds
a text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from data_rate import rows

from parley.units import GIB

MIB = GIB / 1024


def planted(count: int) -> Iterator[dict[str, str]]:
    """Rows of which one in 200 is equal to an earlier one and one in 200 has another last word."""
    earlier: list[dict[str, str]] = []
    rng = random.Random(0)
    for number, row in enumerate(rows(count)):
        if number % 200 == 100:
            row = rng.choice(earlier)
        elif number % 200 == 150:
            row = {**(old := rng.choice(earlier)), "response": old["response"] + " Indeed."}
        elif len(earlier) < 1000:
            earlier.append(row)
        yield row


def rotated(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Rows of `path` again and again, with the words of each text rotated further every time round."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number in range(count):
        row, shift = lines[number % len(lines)], number // len(lines)
        yield {name: _rotate(value, shift) if isinstance(value, str) else value for name, value in row.items()}


def _rotate(text: str, shift: int) -> str:
    words = text.split(" ")
    at = (7 * shift) % len(words)
    return " ".join(words[at:] + words[:at])


def measure(arguments: list[str]) -> dict[str, float]:
    start = perf_counter()
    command = [sys.executable, "-m", "parley.cli.main", "inspect", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"ended with status {status}"
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(perf_counter() - start, 1),
        "peak_mib": round(usage.ru_maxrss * 1024 / MIB),
    }


def compare_libraries(count: int = 2000, permutations: int = 128) -> dict[str, float]:
    """Microseconds of CPU time a text, for signatures of `permutations` values."""
    from datasketch import MinHash
    from rensa import RMinHash

    texts = [[" ".join(t) for t in zip(*(row["response"].split()[i:] for i in range(3)))] for row in rows(count)]  # noqa: B905
    start = process_time()
    RMinHash.digest_matrix_from_token_sets(texts, permutations, 1).to_rows()
    rensa = process_time() - start
    start = process_time()
    for text in texts:
        MinHash(num_perm=permutations, seed=1).update_batch([word.encode() for word in text])
    datasketch = process_time() - start
    return {"rensa": round(rensa / count * 1e6, 1), "datasketch": round(datasketch / count * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", help="hub id or folder; its tokenizer alone is loaded")
    parser.add_argument("--data", type=Path, help="a JSON-lines file to take rows from")
    parser.add_argument("--libraries", action="store_true", help="compare rensa and datasketch (not a dependency)")
    arguments = parser.parse_args()
    if arguments.libraries:
        print(json.dumps(compare_libraries()))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        source = rotated(arguments.data, arguments.rows) if arguments.data else planted(arguments.rows)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in source)
        size = round(path.stat().st_size / 1e6)
        options = ["--model", arguments.model] if arguments.model else []
        print(json.dumps({"rows": arguments.rows, "megabytes": size, **measure([str(path), "--json", *options])}))


if __name__ == "__main__":
    main()
