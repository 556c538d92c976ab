"""A DPO step beside the supervised step of the same tokens, and beside TRL's: time and memory.

    python benchmarks/preference_step.py --model DIR --data rows.jsonl --quantization nf4
    python benchmarks/preference_step.py --model parley-demo --steps 6 --trl-steps 2        # on a CPU

A step has 4 x 2 pairs. The chosen answer is a row's own, the rejected one another row's, so that lengths are real; the
supervised step has all those answers as conversations of their own. In the first epoch each pair's reference is
measured, in the second it is known. TRL's model is loaded by transformers, bitsandbytes and PEFT alone, with TRL's
defaults. Each trainer runs in a process of its own; prints one RESULT line of JSON for each and a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peers import in_turn, stock_model, synchronize
from transformers import TrainerCallback

import parley
from parley.config import DEMO_DATA, RunConfig
from parley.data.prepare import read_examples
from parley.models.adapters import attach_lora
from parley.models.load import load_model
from parley.training.preference.losses import ORPO, SimPO

PAIRS, ACCUMULATION = 2, 4
TRAINERS = ("supervised", "dpo", "trl", "kto", "orpo", "simpo")
OBJECTIVES = {"orpo": ORPO(0.1), "simpo": SimPO(2.0, 1.0)}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, until the device is done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def pairs_of(data: str, count: int) -> list[dict[str, Any]]:
    """The first `count` questions of `data`, each with its answer and with that of another row."""
    _, examples = read_examples(RunConfig.create({"data": data}).data)
    turns = []
    for example in examples:
        messages = example.messages or []
        if len(messages) >= 2 and messages[-1]["role"] == "assistant":
            turns.append((messages[:-1], messages[-1:]))
        if len(turns) == count:
            break
    return [
        {"prompt": prompt, "chosen": answer, "rejected": turns[(index + 7) % len(turns)][1]}
        for index, (prompt, answer) in enumerate(turns)
    ]


def make_trainer(who: str, options: argparse.Namespace, folder: str) -> Any:
    # Two epochs, so that half of the steps know their reference.
    pairs = pairs_of(options.data, PAIRS * ACCUMULATION * max(1, options.steps // 2))
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": options.trl_steps if who == "trl" else options.steps, "logging_steps": 10,
        "gradient_accumulation_steps": ACCUMULATION, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "max_length": 2048, "learning_rate": 1e-5, "seed": 0, "bf16": torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",  # the same tokens in each trainer's step
        "optim": "adamw_8bit" if torch.cuda.is_available() else "adamw_torch", "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    clock = StepClock()
    shared: dict[str, Any] = {"train_dataset": Dataset.from_list(rows_of(who, pairs)), "callbacks": [clock]}
    if who == "trl":
        model, tokenizer, lora = stock_model(options.model, options.quantization)
        trainer: Any = trl.DPOTrainer(
            model, args=trl.DPOConfig(per_device_train_batch_size=PAIRS, **common), processing_class=tokenizer,
            peft_config=lora, **shared,
        )  # fmt: skip
        return trainer, clock
    section = RunConfig.create(
        {"model": {"name": options.model, "quantization": options.quantization, "max_seq_length": 2048}}
    )
    model, tokenizer = load_model(section.model)
    assert section.lora is not None
    model, shared["processing_class"] = attach_lora(model, section.lora, seed=0), tokenizer
    if who in ("supervised", "kto"):
        kind, config = (
            (parley.SFTTrainer, parley.SFTConfig) if who == "supervised" else (parley.KTOTrainer, parley.KTOConfig)
        )
        return kind(model, args=config(per_device_train_batch_size=2 * PAIRS, **common), **shared), clock
    args = parley.DPOConfig(per_device_train_batch_size=PAIRS, **common)
    return parley.DPOTrainer(model, args=args, objective=OBJECTIVES.get(who), **shared), clock


def rows_of(who: str, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, or each of their answers as a row of its own."""
    sides = ("chosen", "rejected")
    if who == "supervised":
        return [{"messages": [*pair["prompt"], *pair[side]]} for pair in pairs for side in sides]
    if who == "kto":
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs
            for side in sides
        ]
    return pairs


def measure(who: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(who, options, folder)
        with in_turn(options.lock):
            trainer.train()
    half = len(clock.seconds) // 2
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    reserved = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    first = clock.seconds[1:half] or clock.seconds[1:] or clock.seconds  # the first step compiles
    print("RESULT " + json.dumps({
        "who": who,
        "first_epoch_ms": round(1000 * statistics.median(first), 2),
        "second_epoch_ms": round(1000 * statistics.median(clock.seconds[half:]), 2),
        "steps": len(clock.seconds),
        "peak_gib": round(memory, 3),
        "reserved_gib": round(reserved, 3),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="parley-demo")
    parser.add_argument("--data", default=DEMO_DATA)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trl-steps", type=int, default=6)
    parser.add_argument("--who", choices=TRAINERS, help="this trainer alone, in this process")
    parser.add_argument("--lock", help="a file whose holder measures; the other processes load and wait")
    options = parser.parse_args()
    if options.who:
        measure(options.who, options)
        return
    found: dict[str, dict[str, Any]] = {}
    for who in TRAINERS[:3]:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--who", who]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{who}: {done.stderr.strip().splitlines()[-3:]}", flush=True)
            continue
        print(f"RESULT {lines[-1]}", flush=True)
        found[who] = json.loads(lines[-1])
    if "supervised" not in found or "dpo" not in found:
        return
    base, dpo, peer = found["supervised"], found["dpo"], found.get("trl")
    for epoch in ("first_epoch_ms", "second_epoch_ms"):
        ratio = dpo[epoch] / base[epoch]
        against = f", TRL {peer[epoch]} ms ({peer[epoch] / dpo[epoch]:.1f} x)" if peer else ""
        print(f"{epoch:16} DPO {dpo[epoch]} ms, supervised {base[epoch]} ms ({ratio:.2f} x){against}")
    if base["peak_gib"]:
        print(f"memory: DPO {dpo['peak_gib']} GiB, supervised {base['peak_gib']} GiB "
              f"({dpo['peak_gib'] / base['peak_gib'] - 1:+.1%})")  # fmt: skip


if __name__ == "__main__":
    main()
