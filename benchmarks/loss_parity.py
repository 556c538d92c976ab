"""Does Parley learn what stock TRL learns? Trains stock TRL on a finished run's own batches and compares each loss.

    python benchmarks/loss_parity.py RUN --splits 8x1,4x2 --steps 200,60

The rows, their order, the adapter's initial values and all hyperparameters are the run's; model, PEFT, collator
(padded) and trainer are stock. TRL runs once for each split of a step into micro-batches, which shows how much its own
losses vary. Prints the largest relative differences of losses, of the final held-out loss where TRL took all steps, and
a RESULT line of JSON. Exits with 1 when a step's loss differs by more than 0.5%.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import trl
from rich.console import Console
from transformers import TrainerCallback

from parley.models.device import pick_device
from parley.training.arguments import sft_config
from parley.training.prepare_training import prepare_training
from parley.training.run_folder import RunFolder
from parley.training.trainer import SFTTrainer

BOUND = 0.005
Losses = list[dict[str, float]]


class LossRecorder(TrainerCallback):
    """Records every logged loss and stops after `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: Losses = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def train_stock(
    folder: RunFolder, split: str, steps: int, total_steps: int, *, unrounded: bool = False
) -> tuple[Losses, float | None]:
    """The losses of stock TRL on the run's batches, split as in "8x1" (batch x accumulation), and its held-out loss.

    `unrounded`: adapters are set back to float32 after TRL has cast them to bfloat16, as it does on quantised models.
    """
    config = folder.config
    batch, accumulate = map(int, split.split("x"))
    per_step = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    assert batch * accumulate == per_step, f"{split} does not split a step of {per_step} rows"
    setup = prepare_training(config, Console(quiet=True))
    recorder = LossRecorder(steps)
    with tempfile.TemporaryDirectory() as scratch:
        args, _ = sft_config(config, Path(scratch), pick_device(config.model.device))
        args.save_strategy, args.max_steps = "no", total_steps
        args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, accumulate
        args.gradient_checkpointing = False  # changes no loss
        adapters = [(p, p.data) for p in setup.model.parameters() if p.requires_grad]
        trainer = trl.SFTTrainer(
            setup.model, args, train_dataset=setup.data.train, processing_class=setup.tokenizer, callbacks=[recorder]
        )
        for parameter, value in adapters if unrounded else ():
            parameter.data = value
        trainer.train()
        args, _ = sft_config(config, Path(scratch), pick_device(config.model.device))
        evaluator = SFTTrainer(
            setup.model,
            args,
            train_dataset=setup.data.train,
            eval_dataset=setup.data.heldout,
            processing_class=setup.tokenizer,
            engine="plain",
        )
        heldout = None if setup.data.heldout is None else evaluator.evaluate()["eval_loss"]
    return recorder.losses, heldout


def max_relative_difference(ours: Losses, theirs: Losses) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", default="50", help="of each split; the last holds for those that follow")
    parser.add_argument("--splits", default="8x1,4x2")
    parser.add_argument("--unrounded", action="store_true", help="keep TRL's adapters in float32 on a quantised model")
    options = parser.parse_args()

    folder = RunFolder.open(options.run)
    ours = [event for line in folder.events.read_text().splitlines() if (event := json.loads(line))["event"] == "step"]
    final = json.loads((folder.path / "report.json").read_text())["after"]["heldout_loss"]
    results = {}
    splits, steps = options.splits.split(","), [int(count) for count in options.steps.split(",")]
    for split, count in zip(splits, [*steps, *steps[-1:] * len(splits)], strict=False):
        results[split] = train_stock(folder, split, count, ours[-1]["step"], unrounded=options.unrounded)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    first, *others = results.values()

    print("step  loss: parley, trl " + ", trl ".join(results) + "; grad norm: parley, trl")
    for step, (own, *others_at_step) in enumerate(zip_longest(ours, *(losses for losses, _ in results.values())), 1):
        if step <= 3 or step % 20 == 0:
            losses = ", ".join(f"{logs['loss']:.4f}" for logs in (own, *others_at_step) if logs)
            norms = ", ".join(f"{logs['grad_norm']:.4f}" for logs in (own, *others_at_step[:1]) if logs)
            print(f"{step:4d}  {losses}; {norms}")
    complete = len(first[0]) == len(ours) and first[1] is not None
    result = {
        "steps": len(first[0]),
        "max_relative_difference": max_relative_difference(ours, first[0]),
        "bound": BOUND,
        "trl_moves_by": max((max_relative_difference(losses, first[0]) for losses, _ in others), default=None),
        "heldout_relative_difference": abs(final - first[1]) / first[1] if complete and first[1] else None,
        "heldout": [final, first[1]] if complete else None,
        "least_grad_norm": min(event["grad_norm"] for event in ours),
    }
    print("RESULT " + json.dumps(result))
    return int(result["max_relative_difference"] > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
