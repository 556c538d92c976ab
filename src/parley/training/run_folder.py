"""A run folder.

run.yaml        the resolved settings, every default written out, without secrets
adapter/        the PEFT adapter (or, after full fine-tuning, model/ with all weights), with tokenizer and template
base.json       the fingerprint of a local base model: an export checks that it merges into the same weights
golden.json     conversations with the token ids they rendered to: a server compares its own against them
events.jsonl    one JSON object a line for each logged step, evaluation and checkpoint
checkpoints/    the trainer's checkpoints, from the last of which a run is resumed (training/checkpoint.py)
nonfinite.jsonl the rows of each step whose loss or gradient was not finite, where there was one
run.lock        while a process writes into the folder
best/           with training.keep: best, the weights of the evaluation with the lowest held-out loss
report.html, report.json

A folder from elsewhere is data: opening it runs no code of it, and writing into it follows no link out of it.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from parley.config import DEMO_MODEL, RunConfig
from parley.data.golden import golden_ids
from parley.errors import RunError, UsageError
from parley.library_compat.tokenizers import save_tokenizer
from parley.models.adapter_files import CONFIG_FILE
from parley.models.fingerprint import base_fingerprint
from parley.models.load import load_adapter, load_model
from parley.models.save_sharded import save_sharded
from parley.models.sharding import is_sharded
from parley.models.tokenizer import fit_vocabulary, read_tokenizer
from parley.safe_yaml import read_yaml_file
from parley.training.checkpoint import (
    UNRELATED_TO_SPACE,
    WRITE_ERRORS,
    checkpoints_in,
    newest_whole,
    read_json,
    replace_folder,
    step_of,
    sync_folder,
    write_fault,
)
from parley.training.json_lines import WEIGHTS, read_events
from parley.training.report import replace_file
from parley.training.run_lock import LOCK, RunLock, is_locked

logger = logging.getLogger(__name__)


class RunFolder:
    """The files of one run. `create` makes a new one, `open` finds an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "run.yaml"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.base = path / "base.json"
        self.golden = path / "golden.json"
        self.events = path / "events.jsonl"
        self.bad_rows = path / "bad_rows.jsonl"
        self.nonfinite = path / "nonfinite.jsonl"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.trust_remote_code = False
        self.rewards: list[str] = []  # programs that the run's command names, and that its folder alone does not run
        self.stopped_at: Path | None = None  # the checkpoint whose weights are read where the run did not finish
        self._made: list[Path] = []
        self._lock: RunLock | None = None

    @classmethod
    def check_output(cls, path: Path) -> None:
        """Raises RunError where a run cannot be written to `path`: taken, or not writable. Leaves nothing behind."""
        # Everything that create() will do is tried, then undone: os.access() knows neither read-only mounts nor root.
        made: list[Path] = []
        try:
            if path.exists() and not path.is_dir():
                raise RunError(f"output {path}: is no folder; choose another with --output")
            _check_empty(path)
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
        folder.keep_rewards(config)
        try:
            folder._made = _make_folders(folder.path)
            folder.lock()
            _check_empty(folder.path)  # another process may have finished a run in it meanwhile
            folder.config_file.write_text(with_places(config).to_yaml(), encoding="utf-8")
            if config.model.name == DEMO_MODEL or Path(config.model.name).is_dir():
                folder.base.write_text(json.dumps({"fingerprint": base_fingerprint(config.model)}), encoding="utf-8")
        except OSError as error:
            folder.unlock()
            _remove_folders(folder._made)
            raise error if isinstance(error, RunError) else _not_writable(folder.path, error) from None
        return folder

    def lock(self) -> None:
        """Become the folder's one writer. Raises RunError where another process is, or none can be."""
        try:
            self._lock = RunLock(self.path)
        except RunError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"{self.path}: cannot be written ({reason}); make it writable, or copy the run elsewhere"
            ) from None

    def keep_rewards(self, config: RunConfig) -> None:
        """Name the rewards of `config` in `resume_command`, where a resumed run needs them named again."""
        self.rewards = [] if config.training.trusts_rewards else list(config.training.rewards)

    def unlock(self) -> None:
        """End `lock`. Doing it again changes nothing."""
        if self._lock is not None:
            self._lock.release()

    def write_config(self, config: RunConfig) -> None:
        """Write run.yaml anew, after settings were changed."""
        replace_file(self.config_file, with_places(config).to_yaml(), self.resume_command)

    @property
    def resume_command(self) -> str:
        return " ".join(
            [f"parley train --resume {self.path}", *(f"--reward {shlex.quote(name)}" for name in self.rewards)]
        )

    @property
    def is_finished(self) -> bool:
        """Whether the run went through all of its stages: its report has the scores after training."""
        try:
            return read_json(self.path / "report.json").get("after") is not None and self.weights.is_dir()
        except (OSError, ValueError):
            return False

    @property
    def is_overtaken(self) -> bool:
        """Whether a checkpoint has more steps than the saved weights: the run was extended, and has not finished."""
        saved = [event["step"] for event in read_events(self.events) if event["event"] == WEIGHTS]
        return bool(saved) and any((step_of(path) or 0) > saved[-1] for path in checkpoints_in(self.checkpoints))

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
        if not folder.weights.is_dir() or folder.is_overtaken:
            folder._use_checkpoint()
        if folder._read_config().model.trust_remote_code and not trust_remote_code:
            logger.warning("%s: trust_remote_code of run.yaml is ignored when a run is opened", path)
        return folder

    def _use_checkpoint(self) -> None:
        """Read the weights of the last whole checkpoint, and log it. Raises RunError where there is none."""
        checkpoint, damaged = newest_whole(self.checkpoints)
        for each in damaged:
            logger.warning("%s: %s", self.path, each)
        if checkpoint is None:
            raise RunError(
                f"{self.path}: the run did not finish, and no checkpoint is whole; to train it: {self.resume_command}"
            )
        logger.warning(
            "%s: the run has not finished; %s is used (to continue: %s)",
            self.path,
            checkpoint.name,
            self.resume_command,
        )
        self.stopped_at = checkpoint

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
        if not (self.weights / CONFIG_FILE).is_file():  # a whole model
            model, _ = load_model(section.model_copy(update={"name": str(self.weights), "adapter": "auto"}))
        else:
            # A run that continued an adapter saved all of it; an adapter that was merged first is part of the base.
            start = "merge" if section.adapter == "merge" else "new"
            base, _ = load_model(section.model_copy(update={"name": self.base_name(), "adapter": start}))
            model = load_adapter(base, self.weights)
        tokenizer = read_tokenizer(self.weights, section)
        embeddings = model.get_input_embeddings().weight.shape[0]
        return model, fit_vocabulary(tokenizer, embeddings, section.model_copy(update={"name": str(self.weights)}))

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
        """Folder of the trained weights: the adapter, or the whole model after full fine-tuning; of a run that did not
        finish and was opened, its last checkpoint."""
        return self.stopped_at or (self.model if self.model.is_dir() else self.adapter)

    @property
    def config(self) -> RunConfig:
        """run.yaml, with `output` as the folder is now called. Raises RunError where it is not settings."""
        config = self._read_config()
        config.model.trust_remote_code = self.trust_remote_code
        if not config.training.trusts_rewards:  # a folder from elsewhere runs no program
            config.training.rewards = []
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

    def write_golden(self, tokenizer: Any) -> None:
        """Write the golden ids: before training, so that checkpoints can be served too."""
        self.golden.write_text(json.dumps(golden_ids(tokenizer), ensure_ascii=False, indent=1), encoding="utf-8")

    def save_weights(self, model: Any, tokenizer: Any, full: bool) -> Path:
        """Write weights, tokenizer and template atomically, then the golden ids.

        Raises RunError where they cannot be written: see `write_error`.
        """
        target = self.model if full else self.adapter
        try:
            _replace_folder(target, partial(_write, model, tokenizer))
            self.write_golden(tokenizer)
        except WRITE_ERRORS as error:
            if write_fault(error) is None:
                raise
            raise self.write_error(error, model, tokenizer) from None
        return target

    def write_error(self, error: BaseException, model: Any, tokenizer: Any, step: int | None = None) -> RunError:
        """The error to raise after the disk failed: where training can continue from.

        Where no checkpoint is whole, the weights are saved as a run in the system's temporary folder first.
        """
        when = "" if step is None else f" at step {step}"
        fault = f"{write_fault(error)}{when} while saving into {self.path}"
        checkpoint, _ = newest_whole(self.checkpoints)
        if checkpoint is not None:
            return RunError(f"{fault}; {checkpoint.name} is whole: free space, then {self.resume_command}")
        rescue = RunFolder(Path(tempfile.mkdtemp(prefix="parley-rescue-")))
        try:
            shutil.copy(self.config_file, rescue.config_file)
            _write(model, tokenizer, rescue.adapter if is_adapter(model) else rescue.model)
            rescue.write_golden(tokenizer)
        except WRITE_ERRORS:
            shutil.rmtree(rescue.path, ignore_errors=True)
            return RunError(f"{fault}, and into {rescue.path.parent} too; free space and train again")
        return RunError(f"{fault}; the weights are whole in {rescue.path}, a run of its own: parley chat {rescue.path}")


def is_adapter(model: Any) -> bool:
    return isinstance(model, PeftModel)


def is_disk_full(error: BaseException) -> bool:
    """Python reports it by errno; safetensors only in its message, and torch.save not at all."""
    fault = write_fault(error)
    return fault is not None and fault not in UNRELATED_TO_SPACE


def _check_empty(path: Path) -> None:
    """Raises RunError where `path` holds a run or other files. A lock alone is no file of a run."""
    if not path.is_dir() or all(entry.name == LOCK for entry in path.iterdir()):
        return
    if not RunFolder.is_run(path):
        raise RunError(f"output {path}: already holds other files; choose another with --output, or remove it")
    folder = RunFolder(path)
    if folder.is_finished or (folder.weights.is_dir() and not folder.is_overtaken):
        raise RunError(f"output {path}: already holds another run; choose another with --output, or remove it")
    if is_locked(path):
        raise RunError(f"output {path}: another process is training into it; choose another with --output")
    raise RunError(
        f"output {path}: holds an unfinished run; continue it with {folder.resume_command}, or choose another with "
        "--output"
    )


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(f"output {path}: cannot be written ({error.strerror or error}); choose another with --output")


def with_places(config: RunConfig) -> RunConfig:
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
    if is_sharded(model) and not is_adapter(model):
        folder.mkdir(parents=True)
        save_sharded(model, folder)
    else:
        model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def _replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """`write` into a sibling, then rename: a reader never meets half-written weights."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
        sync_folder(unfinished)
        replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
