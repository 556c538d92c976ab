"""Does Parley learn what stock TRL learns? Trains stock TRL on a finished run's own batches and compares each loss.

    python benchmarks/loss_parity.py RUN [--steps 50]

The rows, their order, the adapter's first values and all hyperparameters are the run's; model, PEFT, collator (padded)
and trainer are stock. Prints the largest relative difference and one line of JSON; ends with 1 when it is over 0.5%.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import trl
from rich.console import Console
from transformers import TrainerCallback

from parley.models.device import pick_device
from parley.road.loading import load
from parley.training.arguments import sft_config
from parley.training.run_folder import RunFolder

BOUND = 0.005


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.seen.append(logs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    folder = RunFolder.open(options.run)
    ours = [event for line in folder.events.read_text().splitlines() if (event := json.loads(line))["event"] == "step"]
    config = folder.config
    ready = load(config, Console())
    losses = Losses()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= options.steps

    with tempfile.TemporaryDirectory() as scratch:
        args, _ = sft_config(config, Path(scratch), pick_device(config.model.device))
        args.save_strategy = "no"
        args.max_steps = ours[-1]["step"]  # the schedule of the whole run
        trainer = trl.SFTTrainer(
            ready.model,
            args,
            train_dataset=ready.data.train,
            processing_class=ready.tokenizer,
            callbacks=[losses, Stop()],
        )
        trainer.train()

    worst, report = 0.0, []
    for mine, theirs in zip(ours, losses.seen[: options.steps], strict=False):
        difference = abs(mine["loss"] - theirs["loss"]) / abs(theirs["loss"])
        worst = max(worst, difference)
        report.append((mine["step"], mine["loss"], theirs["loss"], mine["grad_norm"], theirs["grad_norm"]))
    print("step  parley    trl       grad norm parley / trl")
    for step, loss, other, norm, other_norm in report:
        if step <= 5 or step % 10 == 0:
            print(f"{step:4d}  {loss:.4f}  {other:.4f}  {norm:.4f} / {other_norm:.4f}")
    print("RESULT " + json.dumps({"steps": len(report), "max_relative_difference": worst, "bound": BOUND}))
    return int(worst > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
