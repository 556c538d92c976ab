"""GRPO: how fast answers are sampled, and what share of a step that takes, beside `parley generate` and TRL.

    python benchmarks/grpo_step.py --model DIR --quantization nf4 --tokens 128
    python benchmarks/grpo_step.py --model parley-demo --tokens 16 --steps 3 --trl-steps 2      # on a CPU

A step has 8 prompts with 8 answers each. Of random weights every answer has its full length. Each of the three runs in
a process of its own; prints one RESULT line of JSON for each and a table. TRL samples through transformers' generate,
and its model is loaded by transformers, bitsandbytes and PEFT alone.
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

import parley
from parley.config import GenerationSection, RunConfig
from parley.inference.generate import Generator
from parley.models.adapters import attach_lora
from parley.models.load import load_model

PROMPTS, ANSWERS = 8, 8
BATCH = PROMPTS * ANSWERS
WHO = ("generate", "grpo", "trl")
QUESTION = "What is {} plus {}? Explain each step of your calculation, and then say the sum once more."


def prompts(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": QUESTION.format(index, 3 * index + 1)}] for index in range(count)]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    section = RunConfig.create(
        {"model": {"name": options.model, "quantization": options.quantization, "max_seq_length": 2048}}
    )
    model, tokenizer = load_model(section.model)
    assert section.lora is not None
    return attach_lora(model, section.lora, seed=0), tokenizer


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(ids) % 101 / 101 for ids in completion_ids]


def measure_generate(options: argparse.Namespace) -> dict[str, Any]:
    """As `parley generate` at a batch of 64; its second call, which captures and compiles nothing."""
    model, tokenizer = load(options)
    settings = GenerationSection(temperature=1.0, min_p=0, max_new_tokens=options.tokens, seed=0)
    rates = []
    with in_turn(options.lock), Generator(model, tokenizer, slots=BATCH) as generator:
        asked = [prompt for prompt in prompts(PROMPTS) for _ in range(ANSWERS)]
        for _ in range(3):
            synchronize()
            started = time.perf_counter()
            answers = dict(generator.answers(asked, settings))
            seconds = time.perf_counter() - started
            tokens = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers.values())
            rates.append(min(tokens, BATCH * options.tokens) / seconds)
    # Answers of random weights are rarely text that is tokenized back: what was sampled is their full length there.
    full = BATCH * options.tokens / seconds
    return {"tokens_per_s": round(full if options.full_length else max(rates[1:])), "seconds": round(seconds, 3)}


def measure_trainer(who: str, options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    steps = options.trl_steps if who == "trl" else options.steps
    settings: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 16, "gradient_accumulation_steps": BATCH // 16,
        "num_generations": ANSWERS, "max_completion_length": options.tokens, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-6, "seed": 0,
        "optim": "adamw_8bit" if on_gpu else "adamw_torch", "bf16": on_gpu, "use_cpu": not on_gpu,
    }  # fmt: skip
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts(PROMPTS * 8)])
    with tempfile.TemporaryDirectory() as folder:
        if who == "grpo":
            model, tokenizer = load(options)
            args: Any = parley.GRPOConfig(folder, **settings)
            trainer: Any = parley.GRPOTrainer(model, reward, args, data, processing_class=tokenizer)
        else:
            model, tokenizer, lora = stock_model(options.model, options.quantization)
            args = trl.GRPOConfig(folder, **settings)
            trainer = trl.GRPOTrainer(model, reward, args, data, processing_class=tokenizer, peft_config=lora)
        clock = _Clock(trainer)
        with in_turn(options.lock):
            trainer.train()
    steps_of = [row for row in trainer.state.log_history if "step_time" in row][1:]  # the first one compiles
    step = statistics.median(row["step_time"] for row in steps_of)
    sampling = statistics.median(clock.seconds[1:])
    return {
        "tokens_per_s": round(statistics.median(clock.rates[1:])),
        "step_seconds": round(step, 3),
        "sampling_seconds": round(sampling, 3),
        "sampling_share": round(sampling / step, 3),
        "answer_tokens": statistics.median(row["completions/mean_length"] for row in steps_of),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else 0,
        "path": "" if who == "trl" else trainer.plain_because or trainer.rollouts.plain_because or "fused",
    }


class _Clock:
    """Seconds and tokens/s of each call that samples a generation."""

    def __init__(self, trainer: Any) -> None:
        self.seconds: list[float] = []
        self.rates: list[float] = []
        sample = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            sampled = sample(*args, **kwargs)
            synchronize()
            self.seconds.append(time.perf_counter() - started)
            self.rates.append(sum(map(len, sampled[0])) / self.seconds[-1])
            return sampled

        trainer._generate_single_turn = timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="parley-demo")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--tokens", type=int, default=128, help="the most tokens of an answer")
    parser.add_argument("--full-length", action="store_true", help="random weights: no answer ends before")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trl-steps", type=int, default=2)
    parser.add_argument("--who", choices=WHO, help="this one alone, in this process")
    parser.add_argument("--lock", help="a file whose holder measures; the other processes load and wait")
    options = parser.parse_args()
    if options.who:
        found = measure_generate(options) if options.who == "generate" else measure_trainer(options.who, options)
        print("RESULT " + json.dumps({"who": options.who} | found), flush=True)
        return
    results: dict[str, dict[str, Any]] = {}
    for who in WHO:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--who", who]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        print(lines[-1] if lines else f"{who}: {done.stderr.strip().splitlines()[-3:]}", flush=True)
        if lines:
            results[who] = json.loads(lines[-1][7:])
    if "grpo" in results:
        own = results["grpo"]["tokens_per_s"]
        for who in ("generate", "trl"):
            if who in results:
                print(f"rollouts: {own:,} tokens/s, {own / results[who]['tokens_per_s']:.2f} x those of {who}")


if __name__ == "__main__":
    main()
