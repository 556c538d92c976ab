"""Does a resumed run end where the undisturbed one does, on the device at hand, and does the same run twice?

    python benchmarks/resume_exact.py [--model MODEL] [--engine auto|captured|plain] [--steps 40] [--deterministic]

Trains the embedded model, or MODEL, four times: twice undisturbed, once stopped at half of the steps, and once resumed
from there. Prints the largest absolute difference of adapter weights and of losses from run to run and after resuming,
the median step with and without checkpoints every 50 steps, and a RESULT line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from parley.config import RunConfig
from parley.models.device import pick_device
from parley.pipeline import RunResult, train
from parley.training.resource_usage import device_name


class StopAt(Console):
    """A console that sends this process SIGTERM when the line of `step` is printed."""

    def __init__(self, step: int) -> None:
        super().__init__(file=Path(os.devnull).open("w"), force_terminal=False)  # noqa: SIM115
        self.at = f"step {step}/"

    def print(self, *objects: Any, **kwargs: Any) -> None:
        if objects and str(objects[0]).startswith(self.at):
            os.kill(os.getpid(), signal.SIGTERM)


def adapter(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder.adapter / "adapter_model.safetensors")


def difference(ours: RunResult, theirs: RunResult) -> dict[str, float]:
    """The largest absolute differences; 0 where all bits are the same."""
    a, b = adapter(ours), adapter(theirs)
    losses = zip(ours.report.steps, theirs.report.steps, strict=True)
    return {
        "weights": max(float((a[name] - b[name]).abs().max()) for name in a),
        "losses": max(abs(one.loss - other.loss) for one, other in losses),
    }


def median_step_ms(result: RunResult) -> float:
    seconds = [step.seconds for step in result.report.steps]
    return 1000 * median(after - before for before, after in pairwise(seconds[5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="parley-demo")
    parser.add_argument("--data", default="parley-demo-pirate")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="parley-resume-exact-"))

    def settings(name: str, **training: Any) -> RunConfig:
        values = {
            "model": options.model,
            "data": {"source": options.data, "limit": 2000, "heldout_rows": 0},
            "training": {
                "max_steps": options.steps,
                "engine": options.engine,
                "deterministic": options.deterministic,
                "save_strategy": "no",
                **training,
            },
            "report": {"from_heldout": 0},
            "output": str(root / name),
        }
        return RunConfig.create(values, options.set)

    quiet = Console(quiet=True)
    whole, again = train(settings("whole"), quiet), train(settings("again"), quiet)
    saving = train(settings("saving", save_strategy="steps", save_steps=50), quiet)
    # Lines are printed at the first step and then after every tenth of the steps.
    stopped = train(settings("stopped"), StopAt(1 + 5 * max(1, options.steps // 10)))
    assert stopped.interrupted, "the run was not stopped"
    resumed = stopped.resume(quiet)
    figures = {
        "device": device_name(pick_device("auto")),
        "engine": options.engine,
        "deterministic": options.deterministic,
        "run to run": difference(again, whole),
        "resumed": difference(resumed, whole),
        "median step, ms": round(median_step_ms(whole), 2),
        "median step with checkpoints every 50 steps, ms": round(median_step_ms(saving), 2),
        "a checkpoint, s": round(_save_seconds(saving), 3),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    print("RESULT " + json.dumps(figures))


def _save_seconds(result: RunResult) -> float:
    """The median time between the log of a step and the end of its checkpoint."""
    events = [json.loads(line) for line in result.folder.events.read_text().splitlines()]
    logged = {event["step"]: event["seconds"] for event in events if event["event"] == "step"}
    return median(event["seconds"] - logged[event["step"]] for event in events if event["event"] == "save")


if __name__ == "__main__":
    main()
