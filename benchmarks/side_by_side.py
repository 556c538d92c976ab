"""One training job on Parley and on stock TRL + PEFT, each in a process of its own, in turn, on the same rows.

    python benchmarks/side_by_side.py --model parley-demo --data parley-demo-pirate --steps 60
    python benchmarks/side_by_side.py --model ./llama1b --data rows.jsonl --quantization nf4 --out results.json

Prints one RESULT line of JSON for each trainer, then a Markdown table. Both see the same rendered rows in the same
order, with the same adapter to begin with; stock TRL pads them. `--who` may also name parley-plain and parley-low.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 2**30
SKIP = 15  # steps that the median leaves out
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def train(who: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and report on it."""
    start = time.time()
    import torch
    import trl
    from transformers import TrainerCallback

    from parley.config import RunConfig
    from parley.data.prepare import prepare
    from parley.data.render import pin_date
    from parley.models.adapters import attach_lora
    from parley.models.device import pick_device
    from parley.models.load import load_model
    from parley.training.arguments import sft_config
    from parley.training.trainer import SFTTrainer

    config = RunConfig.create(
        {
            "model": {"name": options.model, "quantization": options.quantization},
            "data": {"source": options.data, "limit": options.rows},
            "training": {
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch,
                "gradient_accumulation_steps": options.accumulate,
                "save_strategy": "no",
                "gradient_checkpointing": who == "trl" and options.checkpoint,
            },
        }
    )
    model, tokenizer = load_model(config.model)
    pin_date(tokenizer, config.data.date)
    data = prepare(config.data, tokenizer, config.model.max_seq_length)
    assert config.lora is not None
    model = attach_lora(model, config.lora, seed=config.training.seed)
    args, _ = sft_config(config, Path("runs/side-by-side"), pick_device(config.model.device))
    stamps: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.time())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(round(logs["loss"], 5))

    common: dict[str, Any] = {"train_dataset": data.train, "processing_class": tokenizer, "callbacks": [Clock()]}
    if who == "trl":
        args.max_length = None
        trainer = trl.SFTTrainer(model, args, **common)
    else:
        kind = who.partition("-")[2]
        choice = {"engine": "plain"} if kind == "plain" else {"memory": kind or "auto"}
        trainer = SFTTrainer(model, args, **common, **choice)
    begun = time.time()
    trainer.train()
    steps = sorted(b - a for a, b in zip(stamps[SKIP:], stamps[SKIP + 1 :], strict=False))
    cuda = torch.cuda.is_available()
    return {
        "who": who,
        "job": options.job,
        "median_step_ms": round(1000 * steps[len(steps) // 2], 2),
        "mean_step_ms": round(1000 * sum(steps) / len(steps), 2),
        "first_step_s": round(stamps[0] - begun, 1),
        "first_step_after_start_s": round(stamps[0] - start, 1),
        "train_wall_s": round(time.time() - begun, 1),
        "steps": len(stamps),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else None,
        "first_losses": losses[:3],
        "last_losses": losses[-2:],
        "losses": losses,
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{platform.processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in PACKAGES},
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| trainer | ms a step, median | mean | first step s | GiB reserved | last losses |", "| --- " * 6 + "|"]
    for r in results:
        figures = (r["median_step_ms"], r["mean_step_ms"], r["first_step_s"], r["peak_reserved_gib"] or "")
        lines.append(f"| {r['who']} | " + " | ".join(str(f) for f in figures) + f" | {r['last_losses']} |")
    by_name = {r["who"]: r for r in results}
    if {"parley", "trl"} <= by_name.keys():
        ours, theirs = by_name["parley"], by_name["trl"]
        apart = max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        faster = theirs["median_step_ms"] / ours["median_step_ms"]
        lines.append(f"\n{faster:.1f} times the steps per second of TRL; losses at most {apart:.2%} apart at any step.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="parley-demo")
    parser.add_argument("--data", default="parley-demo-pirate")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing for TRL")
    parser.add_argument("--who", default="parley,trl")
    parser.add_argument("--job", default="demo")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print("RESULT " + json.dumps(train(options.alone, options)), flush=True)
        return
    results = []
    for who in options.who.split(","):
        ran = subprocess.run([sys.executable, *sys.argv, "--alone", who], stdout=subprocess.PIPE, text=True, check=True)
        line = next(line for line in ran.stdout.splitlines() if line.startswith("RESULT "))
        print(line, flush=True)
        results.append(json.loads(line.removeprefix("RESULT ")))
    print(table(results))
    if options.out:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        options.out.write_text(json.dumps([{**r, "commit": commit} for r in results], indent=1))


if __name__ == "__main__":
    main()
