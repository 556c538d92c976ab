"""Whole steps of the trainer on model families: `parley bench` on random weights in published shapes.

    python benchmarks/family_steps.py --tokenizer FOLDER --data rows.jsonl --steps 1000
    python benchmarks/family_steps.py --shapes gemma3-1b --steps 100 --against trl --peer-steps 6 --tokenizer ...
    python benchmarks/family_steps.py --shapes 1b --set lora.use_dora=true --against unsloth,trl --tokenizer ...
    python benchmarks/family_steps.py --smoke                      # tiny sizes and the demo job, on a CPU too

The models have their own vocabularies; the ids of the given tokenizer are a part of them. They are made on the GPU, if
there is one, in bfloat16. Each trainer runs in a process of its own, as in `parley bench`; peers take `--peer-steps`.
Medians and means are of step 10 on, or of the second half of fewer than 20 steps; "worst early" is the slowest of steps
2 to 30, in medians, and "of the line" over what its tokens take on a line fitted to ms by tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES
from step_spread import FIRST, SKIP, spread
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parley.bench.compare import compare
from parley.bench.jobs import find_job
from parley.config import DEMO_DATA
from parley.errors import ParleyError
from parley.models.demo import demo_model_path

TINY = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
)  # fmt: skip
HEAD = ("shape", "trainer", "path", "steps", "median ms", "mean ms", "mean / median", "of the tokens", "worst early")
MORE = ("of the line", "graphs", "GiB reserved", "predicted", "first step, s", "last loss")


def write_model(shape: str, tokenizer: Path, folder: Path, *, tiny: bool) -> None:
    """A model of random weights with the files of `tokenizer` beside it."""
    special = AutoTokenizer.from_pretrained(tokenizer)
    ids = dict(bos_token_id=special.bos_token_id, eos_token_id=special.eos_token_id, pad_token_id=special.pad_token_id)
    sizes = dict(vocab_size=128256, max_position_embeddings=32768) | SHAPES[shape] | ids | (TINY if tiny else {})
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.bfloat16)
    folder.mkdir()
    for file in tokenizer.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, folder)
    model.save_pretrained(folder)  # after the copies, which may hold another config.json
    del model
    torch.cuda.empty_cache()


def figures(shape: str, report: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    ms_N = np.array(report["step_ms"])
    late_N = ms_N[min(SKIP, len(ms_N) // 2) :]
    row = {
        "shape": shape, "trainer": report["trainer"], "path": report["path"] or "", "steps": report["steps"],
        "median ms": round(float(np.median(late_N)), 2), "mean ms": round(float(late_N.mean()), 2),
        "mean / median": round(float(late_N.mean() / np.median(late_N)), 3),
        "graphs": "{before} + {later}".format(later=len(report["graphs"]["at_steps"]), **report["graphs"]),
        "GiB reserved": report["peak_reserved_gib"], "predicted": report["predicted_gib"],
        "first step, s": report["first_step_after_start_s"], "last loss": report["last_losses"][-1],
    }  # fmt: skip
    if len(ms_N) >= FIRST and report["step_tokens"]:
        even = spread(report)
        row["of the tokens"] = even["the same of tokens"]
        row["worst early"] = even[f"worst of steps 2 to {FIRST}, of the median"]
        row["of the line"] = even["the same, of the line"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    head = (*HEAD, *MORE)
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join("" if row.get(key) is None else str(row[key]) for key in head) + " |")
    return "\n".join(lines)


def reports(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    job = find_job("demo" if args.smoke else args.job)
    for names, steps in ((args.trainers, args.steps), (args.against, args.peer_steps)):
        for name in filter(None, names.split(",")):
            try:
                yield from compare(job, job.config(str(folder), args.data, steps, args.set), [name])
            except ParleyError as error:  # the others go on
                print(f"{folder.name}, {name}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="gemma3-1b,qwen3-1.7b,phi4-mini,1b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer with a chat template")
    parser.add_argument("--data", help="rows")
    parser.add_argument("--job", default="seed", help="of parley bench")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--trainers", default="parley", help="of parley, parley-low, parley-plain, parley-5.5 (GiB)")
    parser.add_argument("--against", default="", help="trl,unsloth")
    parser.add_argument("--peer-steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the run")
    parser.add_argument("--output", type=Path, help="also append the reports to this file, one line of JSON each")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and the demo job")
    args = parser.parse_args()
    if args.smoke:
        args.tokenizer, args.data = args.tokenizer or demo_model_path(), args.data or DEMO_DATA
    rows = []
    with tempfile.TemporaryDirectory(prefix="parley-families-") as temporary:
        for shape in args.shapes.split(","):
            start, folder = time.time(), Path(temporary) / shape
            write_model(shape, args.tokenizer, folder, tiny=args.smoke)
            print(f"{shape}: made in {time.time() - start:.1f} s", flush=True)
            for report in reports(folder, args):
                report = {"shape": shape, "settings": args.set} | report
                rows.append(figures(shape, report))
                print("RESULT " + json.dumps(rows[-1]), flush=True)
                if args.output is not None:
                    with args.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(report) + "\n")
            shutil.rmtree(folder)
    print(table(rows))


if __name__ == "__main__":
    main()
