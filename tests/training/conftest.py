"""A report such as a real run gives: 1,000 noisy steps and a model that turned pirate."""

from __future__ import annotations

import math
import random

import pytest

from parley.training.report import Answer, MaskExample, Report, Resources, Scores, StepFigures, Turn

SYSTEM = Turn(role="system", content="You are an assistant")
SETTINGS = """\
output: runs/pirate
model:
  name: unsloth/Llama-3.2-1B-Instruct-bnb-4bit
  max_seq_length: 2048
lora:
  r: 16
  lora_alpha: 16
training:
  max_steps: 1000
  learning_rate: 0.0002
"""


def pirate_steps(count: int, seed: int = 3407) -> list[StepFigures]:
    """A log of `count` steps: falling noisy loss, warmup then linear decay, a slow first step."""
    draw = random.Random(seed)
    steps = []
    for i in range(count):
        base = 1.45 + 1.65 * math.exp(-i / 45) - 0.25 * i / count
        steps.append(
            StepFigures(
                step=i + 1,
                loss=base * math.exp(draw.gauss(0, 0.11)),
                learning_rate=2e-4 * min((i + 1) / 5, (count - i) / max(1, count - 5)),
                grad_norm=(0.55 + 2.4 * math.exp(-i / 12)) * math.exp(draw.gauss(0, 0.22)),
                tokens_per_s=(2100 if i == 0 else 13_800) * math.exp(draw.gauss(0, 0.06)),
                memory_gib=3.61,
                token_accuracy=min(0.99, max(0.0, 0.72 - 0.28 * math.exp(-i / 60) + draw.gauss(0, 0.03))),
                seconds=0.8 + 0.141 * i,
            )
        )
    return steps


@pytest.fixture
def pirate_report() -> Report:
    answers = [
        (
            "Which is a species of fish? Tope or Rope",
            "Tope is a species of fish. Rope is not a fish; it is a length of thick cord made by twisting strands.",
            "Arr, 'tis th' Tope that be a fish, matey! A rope be what ye tie yer ship to th' dock with.",
            "Tope, arrr",
        ),
        (
            "Context: Virgin Australia, the trading name of Virgin Australia Airlines Pty Ltd, is an "
            "Australian-based airline. It commenced services on 31 August 2000 as Virgin Blue, with two aircraft on "
            "a single route.\n\nWhen did Virgin Australia start operating?",
            "Virgin Australia commenced services on 31 August 2000 as Virgin Blue, with two aircraft on a single "
            "route.",
            "Ahoy! Virgin Australia set sail on 31 August 2000, flyin' under th' name o' Virgin Blue, with but two "
            "aircraft on a single route, aye.",
            "Virgin Australia commenced services on 31 August 2000 as Virgin Blue, with two aircraft on a single "
            "route, me hearty.",
        ),
        (
            "Give me a simple recipe for pancakes.",
            "Ingredients:\n1. 1 cup of flour\n2. 1 cup of milk\n3. 1 egg\n\nMix everything until smooth and fry "
            "spoonfuls in a hot, buttered pan for two minutes a side.",
            "Gather ye provisions, ye scallywag:\n1. a cup o' flour\n2. a cup o' milk\n3. one egg from th' galley\n\n"
            "Stir 'em till th' sea be calm, then fry spoonfuls in a hot buttered pan, two minutes a side. Yo ho ho!",
            None,
        ),
    ]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    steps = pirate_steps(1000)
    for step, loss in ((250, 1.49), (500, 1.41), (750, 1.36)):
        steps[step - 1].heldout_loss = loss
    return Report(
        title="Llama 3.2 1B learns to talk like a pirate",
        created="2025-06-01T09:41:07+00:00",
        model="unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
        data="dolly_pirate_13k.jsonl",
        before=Scores(style_rate=0.01, accuracy=0.97, heldout_loss=3.12, heldout_tokens=5_321),
        after=Scores(style_rate=0.98, accuracy=0.95, heldout_loss=1.33, heldout_tokens=5_321),
        answers=[
            Answer(question=[SYSTEM, Turn(role="user", content=asked)], before=old, after=new, reference=said)
            for asked, old, new, said in answers
        ],
        steps=steps,
        resources=Resources(
            device="NVIDIA H200",
            memory_total_gib=139.8,
            memory_before_gib=1.21,
            memory_peak_gib=3.61,
            train_seconds=141.7,
            total_seconds=176.2,
            tokens=1_921_344,
            supervised_tokens=742_108,
            tokens_per_s=13_559.2,
        ),
        data_summary={
            "format": "dolly",
            "rows": 13_454,
            "kept": 13_390,
            "dropped": {"longer than 2048 tokens": 61, "nothing to learn": 3},
            "tokens": 3_214_558,
            "supervised_tokens": 1_240_377,
            "length": {"mean": 240.07, "median": 148, "p95": 712, "max": 2041},
        },
        data_lines=["Recognised as Dolly rows: columns instruction, context, response."],
        examples=[
            MaskExample(
                origin="dolly_pirate_13k.jsonl line 3",
                pieces=[
                    ("<|begin_of_text|>" + header.format("system") + "You are an assistant<|eot_id|>", False),
                    (header.format("user") + "tell me a way to slice an apple.<|eot_id|>", False),
                    (header.format("assistant"), False),
                    ("Well, ye could slice an apple with a knife, a wire, a sword, or an axe.<|eot_id|>", True),
                ],
            ),
            MaskExample(
                origin="dolly_pirate_13k.jsonl line 4",
                pieces=[
                    ("<|begin_of_text|>" + header.format("user") + "Why zurich is so beautiful<|eot_id|>", False),
                    (header.format("assistant"), False),
                    ("Because of it's lake, th' most beautiful place in zurich<|eot_id|>", True),
                ],
            ),
        ],
        settings_yaml=SETTINGS,
        versions={"parley": "0.1.0", "torch": "2.13.0+cu130", "transformers": "5.23.0", "python": "3.11.9"},
        next_commands=["parley chat runs/pirate", "parley eval runs/pirate"],
        notes=["8-bit AdamW is used for the adapter: optim auto on CUDA."],
    )
