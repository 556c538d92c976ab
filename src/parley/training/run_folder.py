"""A run folder.

run.yaml        the resolved settings, every default written out, without secrets
adapter/        the PEFT adapter (or, after full fine-tuning, model/ with all weights), with tokenizer and template
golden.json     conversations with the token ids they rendered to: a server compares its own against them
events.jsonl    one JSON object a line for each logged step, evaluation and checkpoint
checkpoints/    the trainer's checkpoints
nonfinite.jsonl the rows of each step whose loss or gradient was not finite, where there was one
best/           with training.keep: best, the weights of the evaluation with the lowest held-out loss
report.html, report.json

A folder from elsewhere is data: opening it runs no code of it, and writing into it follows no link out of it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from parley.config import DEMO_MODEL, RunConfig
from parley.data.golden import golden_ids
from parley.errors import RunError, UsageError
from parley.models.load import load_adapter, load_model
from parley.models.tokenizer import check_vocabulary, read_tokenizer
from parley.safe_yaml import read_yaml_file

logger = logging.getLogger(__name__)


class RunFolder:
    """The files of one run. `create` makes a new one, `open` finds an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.yaml"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.golden = path / "golden.json"
        self.events = path / "events.jsonl"
        self.bad_rows = path / "bad_rows.jsonl"
        self.nonfinite = path / "nonfinite.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.trust_remote_code = False
        self._made: list[Path] = []

    @classmethod
    def check_output(cls, path: Path) -> None:
        """Raises RunError where a run cannot be written to `path`: taken, or not writable. Leaves nothing behind."""
        # Everything that create() will do is tried, then undone: os.access() knows neither read-only mounts nor root.
        made: list[Path] = []
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"output {path}: is no folder; choose another with --output")
            if path.is_dir() and any(path.iterdir()):
                held = "another run" if (path / "run.yaml").is_file() else "other files"
                raise RunError(f"output {path}: already holds {held}; choose another with --output, or remove it")
            made = _make_folders(path)
            with tempfile.TemporaryFile(dir=path):  # permissions and read-only mounts show only when a file is made
                pass
        except RunError:
            raise
        except OSError as error:
            raise _not_writable(path, error) from None
        finally:
            _remove_folders(made)

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Make the folder and write run.yaml. Raises RunError where it is taken or cannot be written."""
        cls.check_output(config.output)
        folder = cls(config.output)
        try:
            folder._made = _make_folders(folder.path)
            folder.config_file.write_text(_with_places(config).to_yaml(), encoding="utf-8")
        except OSError as error:
            _remove_folders(folder._made)
            raise _not_writable(folder.path, error) from None
        return folder

    def discard(self) -> None:
        """Remove what was written since `create`: the folder was empty, or did not exist."""
        # The folder itself stays where the user made it; _made has only those of create().
        for entry in list(self.path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():  # rmtree would refuse a link, unlink() a folder
                shutil.rmtree(entry)
            else:
                entry.unlink()
        _remove_folders(self._made)

    @classmethod
    def open(cls, path: str | Path, *, trust_remote_code: bool = False) -> RunFolder:
        """An existing run. Raises RunError where there is no finished run, or its run.yaml is not settings.

        `trust_remote_code` is for the person at the keyboard: what run.yaml says about it is ignored.
        """
        folder = cls.existing(path)
        folder.trust_remote_code = trust_remote_code
        if not folder.weights.is_dir():
            raise RunError(f"{path}: the run did not finish (no adapter); train again into another folder")
        if folder._read_config().model.trust_remote_code and not trust_remote_code:
            logger.warning("%s: trust_remote_code of run.yaml is ignored when a run is opened", path)
        return folder

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """A run, finished or not. Raises RunError where there is none."""
        if not cls.is_run(path):
            raise RunError(f"{path}: no run there (no run.yaml); give the folder `parley train` wrote")
        return cls(Path(path).expanduser())

    @staticmethod
    def is_run(path: str | Path) -> bool:
        try:
            return (Path(path).expanduser() / "run.yaml").is_file()
        except (OSError, RuntimeError):  # a name that is too long; ~ of an unknown user
            return False

    def load(self) -> tuple[Any, Any]:
        """The tuned model and the tokenizer it was trained with, template and date included.

        After LoRA training the model is a PeftModel: under `model.disable_adapter()` it is the base model.
        Raises RunError where the base model is missing, ModelError where weights or tokenizer cannot be used.
        """
        section = self.config.model.model_copy(update={"chat_template": None})  # the saved tokenizer has its template
        if self.model.is_dir():
            model, _ = load_model(section.model_copy(update={"name": str(self.model)}))
        else:
            # A run that continued an adapter saved all of it; an adapter that was merged first is part of the base.
            start = "merge" if section.adapter == "merge" else "new"
            base, _ = load_model(section.model_copy(update={"name": self.base_name(), "adapter": start}))
            model = load_adapter(base, self.adapter)
        tokenizer = read_tokenizer(self.weights, section)
        check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], str(self.weights))
        return model, tokenizer

    def base_name(self) -> str:
        """The base model: a hub id, or the folder where it is now. Raises RunError for a folder that is gone."""
        section = self.config.model
        if section.name_from_run is None:
            return section.name
        # First where it was, then where it is seen from the run: a folder copied with its base finds the copy.
        places = [Path(section.name), self.path / section.name_from_run]
        for place in places:
            if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
                return str(place)
        raise RunError(
            f"{self.path}: its base model is neither at {places[0]} nor at {places[1]}; put it there, or write its "
            f"folder to model.name in {self.config_file}"
        )

    @property
    def weights(self) -> Path:
        """Folder of the trained weights: the adapter, or the whole model after full fine-tuning."""
        return self.model if self.model.is_dir() else self.adapter

    @property
    def config(self) -> RunConfig:
        """run.yaml, with `output` as the folder is now called. Raises RunError where it is not settings."""
        config = self._read_config()
        config.model.trust_remote_code = self.trust_remote_code
        config.output = self.path
        return config

    def _read_config(self) -> RunConfig:
        values = read_yaml_file(self.config_file, RunError)
        if not isinstance(values, dict):
            kind = "nothing" if values is None else f"a {type(values).__name__}"
            raise RunError(f"{self.config_file}: got {kind}, wanted the settings that `parley train` wrote")
        try:
            return RunConfig.create(values)
        except UsageError as error:
            raise RunError(f"{self.config_file}: {error}") from None

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


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(f"output {path}: cannot be written ({error.strerror or error}); choose another with --output")


def _with_places(config: RunConfig) -> RunConfig:
    """`config` with local models and data named so that another working directory, or a moved run, finds them."""
    config = config.model_copy(deep=True)
    # The demo has no folder of its own to find, and a hub id none at all: neither gets name_from_run.
    folder = Path(config.model.name)
    if config.model.name != DEMO_MODEL and folder.is_dir():
        config.model.name = str(folder.resolve())
        config.model.name_from_run = os.path.relpath(folder.resolve(), config.output.resolve())
    if Path(config.data.source).exists():
        config.data.source = str(Path(config.data.source).resolve())
    heldout, hash_sign, split = (config.data.heldout or "").partition("#")
    if heldout and config.data.heldout_share is None and Path(heldout).exists():
        config.data.heldout = f"{Path(heldout).resolve()}{hash_sign}{split}"
    return config


def _make_folders(path: Path) -> list[Path]:
    """Make `path` with its parents; returns those that did not exist, outermost first."""
    made: list[Path] = []
    try:
        for folder in [folder for folder in (path, *path.parents) if not folder.exists()][::-1]:
            folder.mkdir()
            made.append(folder)
    except OSError:
        _remove_folders(made)
        raise
    return made


def _remove_folders(made: list[Path]) -> None:
    """Remove folders of `_make_folders`, innermost first, as far as they are empty."""
    for folder in reversed(made):
        if any(folder.iterdir()):
            return
        folder.rmdir()


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
            shutil.rmtree(target)  # os.replace() takes no folder that has files
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
