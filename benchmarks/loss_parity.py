"""Does Parley learn what stock TRL learns? Trains stock TRL on a finished run's own batches and compares each loss.

    python benchmarks/loss_parity.py RUN --splits 8x1,4x2 --steps 200,60

The rows, their order, the adapter's first values and all hyperparameters are the run's; model, PEFT, collator (padded)
and trainer are stock, once for each way of splitting a step into batches, so that it is seen what TRL itself moves by.
Prints the largest relative differences of losses and, where TRL went as far as the run did, of the final held-out
loss, and a RESULT line of JSON; ends with 1 when a step's loss is over 0.5% away.
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
from parley.training.run_folder import RunFolder
from parley.training.setup import prepare_training
from parley.training.trainer import SFTTrainer

BOUND = 0.005
Losses = list[dict[str, float]]


class Watch(TrainerCallback):
    """Notes every logged loss and stops after `steps`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seen: Losses = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.seen.append(logs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def stock(
    folder: RunFolder, split: str, steps: int, total_steps: int, *, unrounded: bool = False
) -> tuple[Losses, float | None]:
    """What stock TRL logs on the run's batches, split as "8x1" says, and its held-out loss at the end.

    `unrounded`: the adapters go back to float32, after TRL has made them bfloat16, which it does on quantised models.
    """
    config = folder.config
    batch, accumulate = map(int, split.split("x"))
    held = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    assert batch * accumulate == held, f"{split} is no way to split {held} conversations"
    setup = prepare_training(config, Console(quiet=True))
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as scratch:
        args, _ = sft_config(config, Path(scratch), pick_device(config.model.device))
        args.save_strategy, args.max_steps = "no", total_steps
        args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, accumulate
        args.gradient_checkpointing = False  # changes no loss
        adapters = [(p, p.data) for p in setup.model.parameters() if p.requires_grad]
        trainer = trl.SFTTrainer(
            setup.model, args, train_dataset=setup.data.train, processing_class=setup.tokenizer, callbacks=[watch]
        )
        for parameter, value in adapters if unrounded else ():
            parameter.data = value
        trainer.train()
        args, _ = sft_config(config, Path(scratch), pick_device(config.model.device))
        judge = SFTTrainer(
            setup.model,
            args,
            train_dataset=setup.data.train,
            eval_dataset=setup.data.heldout,
            processing_class=setup.tokenizer,
            engine="plain",
        )
        heldout = None if setup.data.heldout is None else judge.evaluate()["eval_loss"]
    return watch.seen, heldout


def apart(ours: Losses, theirs: Losses) -> float:
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
        results[split] = stock(folder, split, count, ours[-1]["step"], unrounded=options.unrounded)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    first, *others = results.values()

    print("step  loss: parley, trl " + ", trl ".join(results) + "; grad norm: parley, trl")
    for step, (mine, *all_theirs) in enumerate(zip_longest(ours, *(seen for seen, _ in results.values())), 1):
        if step <= 3 or step % 20 == 0:
            losses = ", ".join(f"{logs['loss']:.4f}" for logs in (mine, *all_theirs) if logs)
            norms = ", ".join(f"{logs['grad_norm']:.4f}" for logs in (mine, *all_theirs[:1]) if logs)
            print(f"{step:4d}  {losses}; {norms}")
    whole = len(first[0]) == len(ours) and first[1] is not None
    result = {
        "steps": len(first[0]),
        "max_relative_difference": apart(ours, first[0]),
        "bound": BOUND,
        "trl_moves_by": max((apart(seen, first[0]) for seen, _ in others), default=None),
        "heldout_relative_difference": abs(final - first[1]) / first[1] if whole and first[1] else None,
        "heldout": [final, first[1]] if whole else None,
        "least_grad_norm": min(event["grad_norm"] for event in ours),
    }
    print("RESULT " + json.dumps(result))
    return int(result["max_relative_difference"] > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
