"""What checkpoints and evaluations cost the steps around them, on the device at hand.

    python benchmarks/interruption_cost.py [--model MODEL] [--data DATA] [--steps 200] [--every 50] [--set KEY=VALUE]

Trains three times on the same rows: undisturbed, with a checkpoint every so many steps, and with an evaluation of
held-out loss every so many. For each prints the median step, the median of the first step after an interruption, and
the CUDA graphs captured before and after the first interruption: an evaluation should leave those of training as they
are. The last line is a RESULT line of JSON; exits with 1 where a graph was captured anew or dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from parley.config import RunConfig
from parley.models.device import pick_device
from parley.training.arguments import sft_config
from parley.training.fused_trainer import FusedTrainer
from parley.training.prepare_training import prepare_training
from parley.training.resource_usage import StageTimer, device_name
from parley.training.run_training import build_trainer
from parley.training.signals import StopSignals


class Watch(TrainerCallback):
    """Seconds of each step without what comes between steps, and the graphs at each interruption."""

    def __init__(self, trainer: FusedTrainer) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        self.after: list[float] = []  # of the steps that follow an interruption
        self.graphs: list[dict[int, int]] = []  # graph by tokens: at each interruption, and one step after it
        self._begun = 0.0
        self._interrupted = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self._begun = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self.seconds.append(perf_counter() - self._begun)
        if self._interrupted:
            self.after.append(self.seconds[-1])
            self.graphs.append(self._captured())
            self._interrupted = False
        if control.should_save or control.should_evaluate:
            self._interrupted = True
            self.graphs.append(self._captured())

    def _captured(self) -> dict[int, int]:
        step = self.trainer.fused_step
        graphs = step.graphs if step is not None else None
        return {} if graphs is None else {tokens: id(graph) for tokens, graph in graphs.captured.items()}

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def measure(name: str, config: RunConfig) -> dict[str, Any]:
    quiet = Console(quiet=True)
    args, _ = sft_config(config, config.output / "checkpoints", pick_device(config.model.device))
    setup = prepare_training(config, quiet, StageTimer())
    with StopSignals() as signals:
        trainer = build_trainer(setup, args, [], signals)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    pairs = list(zip(watch.graphs[::2], watch.graphs[1::2], strict=False))
    lost = sum(not before.items() <= after.items() for before, after in pairs)
    return {
        "run": name,
        "median step, ms": round(1000 * median(watch.seconds[10:]), 2),
        "first step after, ms": round(1000 * median(watch.after), 2) if watch.after else None,
        "interruptions": len(pairs),
        "graphs": len(watch.graphs[-1]) if watch.graphs else None,
        "captures lost": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="parley-demo")
    parser.add_argument("--data", default="parley-demo-pirate")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="parley-interruption-cost-"))
    runs = {
        "undisturbed": {"save_strategy": "no"},
        "checkpoints": {"save_strategy": "steps", "save_steps": options.every},
        "evaluations": {"save_strategy": "no", "eval_steps": options.every},
    }
    figures = []
    for name, training in runs.items():
        values = {
            "model": options.model,
            "data": {"source": options.data, "limit": 4000, "heldout_rows": 100},
            "training": {"max_steps": options.steps, **training},
            "report": {"from_heldout": 0},
            "output": str(root / name),
        }
        figures.append(measure(name, RunConfig.create(values, options.set)))
        print(json.dumps(figures[-1]), flush=True)
    print("RESULT " + json.dumps({"device": device_name(pick_device("auto")), "runs": figures}))
    if any(figure["captures lost"] for figure in figures):
        sys.exit("graphs of training were dropped")


if __name__ == "__main__":
    main()
