"""Continuing a run in its folder: its settings, its last whole checkpoint, and what may be changed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from parley.config import RunConfig
from parley.errors import RunError, UsageError
from parley.text import print_text, shorten_middle
from parley.training.checkpoint import newest_whole, remove_leftovers, step_of
from parley.training.resume_state import is_free
from parley.training.run_folder import RunFolder, with_places

FREE_SECTIONS = ("generation.", "report.")
# Of the training section, what only this package knows; data.heldout may change the rows, which are compared.
FREE = {
    "data.heldout",
    "model.trust_remote_code",
    "output",
    "training.context_parallel",  # as the number of processes, these change rounding alone
    "training.shard",
    "training.early_stopping",
    "training.keep",
    "training.nonfinite",
    "training.nonfinite_limit",
    "training.rewards",  # compared with those of the checkpoint
}


@dataclass
class ResumedRun:
    """A run that is about to continue. `checkpoint` is None where none was written: it starts at its first step.

    `changed`: by name, each setting that is another than in run.yaml, with both values.
    """

    folder: RunFolder
    config: RunConfig
    checkpoint: Path | None
    changed: dict[str, tuple[Any, Any]]

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else step_of(self.checkpoint) or 0


def open_to_resume(path: Path, config: RunConfig | None, console: Console) -> ResumedRun:
    """Lock a run's folder and find where it continues; prints what was found damaged and what is changed.

    `config`: the run's settings with changes; its own without. Raises UsageError for a change that would make it
    another run, and for a run that is finished; RunError where it is being written, or where no checkpoint is whole.
    """
    folder = RunFolder.existing(path)
    # Paths are compared as run.yaml holds them: a caller's settings may have relative ones.
    saved = with_places(folder.config.model_copy(update={"output": folder.path}))
    config = saved if config is None else with_places(config.model_copy(update={"output": folder.path}))
    changed = changed_settings(saved, config)
    folder.keep_rewards(config)
    if folder.is_finished and not changed:
        raise UsageError(f"{path}: the run is finished; --set training.max_steps=N trains it further")
    folder.lock()
    try:
        remove_leftovers(folder.checkpoints)
        checkpoint, damaged = newest_whole(folder.checkpoints)
        if checkpoint is None and damaged:
            raise RunError(
                f"{path}: no checkpoint is whole ({'; '.join(map(str, damaged))}); remove {folder.checkpoints} to "
                "start again at the first step"
            )
        if checkpoint is None and folder.weights.is_dir():
            raise RunError(f"{path}: no checkpoint was kept, so the run cannot continue; start a new one")
        done, wanted = 0 if checkpoint is None else step_of(checkpoint) or 0, config.training.max_steps
        if 0 < wanted < done:
            raise UsageError(
                f"training.max_steps: got {wanted:,}, and {path} has taken {done:,} steps already; give more, or "
                "start a new run"
            )
    except (RunError, UsageError):
        folder.unlock()
        raise
    for each in damaged:
        print_text(console, f"{each}: the one before it is used")
    for name, (was, now) in changed.items():
        print_text(console, f"{name}: {_short(was)} before, {_short(now)} from here on")
    if changed.keys() & {"training.max_steps", "training.num_train_epochs"} and _schedule_has_an_end(config):
        print_text(console, "the learning rate follows the schedule of the new number of steps from here on")
    resumed = ResumedRun(folder, config, checkpoint, changed)
    place = f"after step {resumed.step}" if checkpoint else "at its first step, as no checkpoint was written"
    print_text(console, f"{path} continues {place}")
    return resumed


def changed_settings(saved: RunConfig, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """By dotted name. Raises UsageError for a setting with which the resumed run would not be the undisturbed one."""
    before, after = _flat(saved.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    changed = {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name != "output"
    }
    for name, (was, now) in changed.items():
        if not _may_change(name):
            raise UsageError(
                f"{name} was {_short(was)} and cannot become {_short(now)} when a run is resumed, as its steps would "
                f"be others; leave it, or start a new run from {saved.output}"
            )
    return changed


def _schedule_has_an_end(config: RunConfig) -> bool:
    return not config.training.lr_scheduler_type.startswith("constant")


def _may_change(name: str) -> bool:
    section, _, key = name.partition(".")
    top = ".".join(name.split(".")[:2])
    return name.startswith(FREE_SECTIONS) or top in FREE or (section == "training" and is_free(key.split(".")[0]))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _short(value: Any) -> str:
    return shorten_middle(str(value), 60)
