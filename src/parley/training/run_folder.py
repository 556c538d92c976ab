"""A run folder.

run.yaml        the resolved settings, every default written out
adapter/        the PEFT adapter (or, after full fine-tuning, model/ with all weights), with tokenizer and template
golden.json     conversations with the token ids they rendered to: a server compares its own against them
events.jsonl    one JSON object a line for each logged step, evaluation and checkpoint
checkpoints/    the trainer's checkpoints
report.html, report.json
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers import AutoTokenizer

from parley.config import RunConfig
from parley.data.golden import golden_ids
from parley.errors import RunError
from parley.models.load import load_adapter, load_model


class RunFolder:
    """The files of one run. `create` makes a new one, `open` finds an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.yaml"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.golden = path / "golden.json"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises RunError where `path` holds another run, or anything else."""
        if path.is_file():
            raise RunError(f"output {path}: is a file; wanted a folder, choose another with --output")
        if path.is_dir() and any(path.iterdir()):
            held = "another run" if (path / "run.yaml").is_file() else "other files"
            raise RunError(f"output {path}: already holds {held}; choose another with --output, or remove it")

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Make the folder and write run.yaml. Raises RunError where it is taken or cannot be written."""
        cls.check_free(config.output)
        folder = cls(config.output)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.config_file.write_text(config.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise RunError(f"output {folder.path}: {error.strerror}; choose another with --output") from None
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Raises RunError where there is no finished run."""
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise RunError(f"{path}: no run there (no run.yaml); give the folder `parley train` wrote")
        if not folder.weights.is_dir():
            raise RunError(f"{path}: the run did not finish (no adapter); train again into another folder")
        return folder

    @staticmethod
    def is_run(path: str | Path) -> bool:
        return (Path(path) / "run.yaml").is_file()

    def load(self) -> tuple[Any, Any]:
        """The tuned model and the tokenizer it was trained with, template and date included.

        After LoRA training the model is a PeftModel: under `model.disable_adapter()` it is the base model.
        """
        section = self.config.model
        if self.model.is_dir():
            model, _ = load_model(section.model_copy(update={"name": str(self.model), "chat_template": None}))
        else:
            base, _ = load_model(section.model_copy(update={"chat_template": None}))
            model = load_adapter(base, self.adapter)
        return model, AutoTokenizer.from_pretrained(self.weights, local_files_only=True)

    @property
    def weights(self) -> Path:
        """Folder of the trained weights: the adapter, or the whole model after full fine-tuning."""
        return self.model if self.model.is_dir() else self.adapter

    @property
    def config(self) -> RunConfig:
        return RunConfig.create(yaml.safe_load(self.config_file.read_text(encoding="utf-8")))

    def save_weights(self, model: Any, tokenizer: Any, full: bool) -> Path:
        """Write weights, tokenizer and template atomically, then the golden ids.

        Raises RunError on a full disk; its message names the system's temporary folder where that had space for the
        weights.
        """

        write = partial(_write, model, tokenizer)
        target = self.model if full else self.adapter
        try:
            _replace_folder(target, write)
            self.golden.write_text(json.dumps(golden_ids(tokenizer), ensure_ascii=False, indent=1), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            raise _rescue(target, write) from None
        return target

    def rescue_weights(self, model: Any, tokenizer: Any, step: int) -> RunError:
        """Save the weights of `step` elsewhere after the disk filled up; returns the error to raise, with the place."""
        return _rescue(self.adapter, partial(_write, model, tokenizer), f" at step {step}")


def is_disk_full(error: BaseException) -> bool:
    """Python reports it by errno; safetensors and torch only in their message."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """`write` into a sibling, then rename: a reader never meets half-written weights."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
        if target.exists():
            shutil.rmtree(target)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _rescue(target: Path, write: Callable[[Path], None], when: str = "") -> RunError:
    rescue = Path(tempfile.mkdtemp(prefix="parley-rescue-")) / target.name
    full = f"disk full{when} while saving into {target.parent}"
    try:
        write(rescue)
    except (OSError, SafetensorError):
        shutil.rmtree(rescue.parent, ignore_errors=True)
        return RunError(f"{full}, and {rescue.parent.parent} too; free space and train again from the last checkpoint")
    return RunError(f"{full}; the weights are whole in {rescue}: free space and move them to {target}")
