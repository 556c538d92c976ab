"""A mixture of experts on Parley and its peers: ms a step with the same model folder and the same conversations.

    python benchmarks/moe_peers.py make qwen3-30b-a3b FOLDER --tokenizer TOKENIZER --layers 8
    python benchmarks/moe_peers.py train parley FOLDER --data rows.jsonl
    python benchmarks/moe_peers.py train unsloth FOLDER --data rows.jsonl

Random weights in the published shape (moe_step.py), bfloat16, LoRA r = 16 on the attention's projections, 8 x 1
conversations, no checkpointing, 8-bit AdamW; steps are timed as `parley bench` does. With `--together N --turns TURNS`,
N processes start at once and time their steps one after the other, each when all have taken their first steps.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

SKIP, TIMED = 6, 14
LONGEST_WAIT = 20  # seconds for the other processes' first steps


def make(shape: str, folder: Path, tokenizer: Path, layers: int) -> None:
    import torch
    from moe_step import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=32768, bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder)


@contextmanager
def turn(turns: Path | None, processes: int, name: str) -> Iterator[Any]:
    """Yields a function to be called before the timed steps, which waits for this process's turn."""
    if turns is None:
        yield lambda: None
        return
    turns.mkdir(exist_ok=True)
    with (turns / "lock").open("w") as lock:

        def wait() -> None:
            (turns / f"{name}.warm").touch()
            until = time.time() + LONGEST_WAIT
            while len(list(turns.glob("*.warm"))) < processes and time.time() < until:
                time.sleep(0.1)
            fcntl.flock(lock, fcntl.LOCK_EX)

        try:
            yield wait
        finally:
            (turns / f"{name}.warm").touch()  # of a process that failed, too: none waits for it


def train(who: str, folder: Path, data: Path, wait: Any) -> dict[str, Any]:
    from transformers import TrainerCallback

    from parley.bench.jobs import Job
    from parley.bench.rows import write_rows
    from parley.bench.trainers import build
    from parley.bench.worker import path_of, peak_memory

    job = Job("moe", "x", quantization="none", batch=8, checkpoint=False, steps=SKIP + TIMED, skip=SKIP)
    overrides = ["lora.target_modules=[q_proj, k_proj, v_proj, o_proj]", "data.limit=400"]
    config = job.config(str(folder), str(data), None, overrides)
    work = folder.parent / f"{folder.name}-{who}"
    shutil.rmtree(work, ignore_errors=True)
    write_rows(job, config, work)
    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SKIP:
                wait()
            times.append(time.time())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(round(float(logs["loss"]), 4))

    trainer = build(who, job, config, work)
    trainer.add_callback(Clock())
    started = time.time()
    trainer.train()
    steps = sorted(1000 * (b - a) for a, b in pairwise(times[SKIP - 1 :]))
    return {
        "who": who, "model": folder.name, "median_step_ms": round(steps[len(steps) // 2], 1),
        "mean_step_ms": round(sum(steps) / len(steps), 1), "first_step_s": round(times[0] - started, 1),
        **peak_memory(),
        "first_losses": losses[:3], "last_losses": losses[-2:],
        "path": path_of(trainer) if who.startswith("parley") else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "train"))
    parser.add_argument("what", help="make: a shape of moe_step.py; train: parley, parley-plain, trl or unsloth")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--turns", type=Path, help="a folder that the processes share")
    parser.add_argument("--together", type=int, default=1)
    args = parser.parse_args()
    if args.command == "make":
        make(args.what, args.folder, args.tokenizer, args.layers)
        return
    if args.what == "unsloth":
        importlib.import_module("unsloth")  # it must be imported before the libraries that it patches
    with turn(args.turns, args.together, f"{args.what}-{os.getpid()}") as wait:
        print("RESULT " + json.dumps(train(args.what, args.folder, args.data, wait)), flush=True)


if __name__ == "__main__":
    main()
