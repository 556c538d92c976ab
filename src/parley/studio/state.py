"""One studio: its folder of runs, its own files, and where it may look."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from parley.config import DEMO_DATA, DEMO_MODEL, DEMO_PREFERENCES, RunConfig
from parley.config_reference import SettingReference
from parley.data.files import is_local
from parley.errors import RunError, UsageError
from parley.safe_yaml import load_yaml
from parley.studio.answers import Answers
from parley.studio.comparison import Shelf
from parley.studio.draft import Draft
from parley.studio.exports import ExportJobs
from parley.studio.queue import Queue
from parley.studio.security import Keys, read_secret
from parley.studio.setting_paths import check_revisions, library_paths
from parley.studio.summaries import Summaries
from parley.studio.sweep import sweep
from parley.studio.votes import PREFERENCES
from parley.studio.worker import Worker
from parley.training.run_summary import RunSummary

FOLDER = ".studio"  # in the folder of runs: what was uploaded, the queue, the secret


class Studio:
    """`root`: the folder of runs; `roots`: the folders whose files pages may open, with those below them."""

    def __init__(self, root: Path, *, port: int, allowed: Sequence[Path] = (), token: str | None = None) -> None:
        """Raises RunError where `root` cannot be written."""
        self.root = root.expanduser().resolve()
        self.folder = self.root / FOLDER
        self.uploads = self.folder / "uploads"
        self.roots = (self.root, *(path.expanduser().resolve() for path in allowed))
        try:
            self.uploads.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self.keys = Keys(read_secret(self.folder / "secret"), port, token)
        except OSError as error:
            raise RunError(f"{root}: cannot be written ({error.strerror}); give another folder for the runs") from None
        self.queue = Queue(self.root, self.folder)
        self.draft = Draft(self.folder / "draft.yaml")
        self.worker = Worker()
        self.summaries = Summaries()
        self.answers = Answers()
        self.comparisons = Shelf()
        self.exports = ExportJobs(self.folder / "exports")
        self.references: list[SettingReference] | None = None  # of all settings, for completion
        self.preferences = self.folder / PREFERENCES

    def runs(self) -> list[RunSummary]:
        """The runs below `root`, newest first."""
        return self.summaries.list(self.root)

    def run_path(self, run_id: str) -> Path:
        """The folder of a run by its path below `root`. Raises RunError where there is none."""
        path = self._below(self.root, run_id)
        if path is None or not os.path.isfile(path / "run.yaml"):  # False as well for a name that is too long
            raise RunError(f"{run_id}: no run of that name in {self.root}")
        return path

    def run_id(self, path: str | Path) -> str:
        """The inverse of `run_path`."""
        return str(Path(path).resolve().relative_to(self.root))

    def check_path(self, text: str) -> Path:
        """The file or folder `text` names, links resolved. Raises UsageError outside of the allowed folders."""
        for root in self.roots:
            path = self._below(root, text)
            if path is not None:
                return path
        places = ", ".join(map(str, self.roots))
        raise UsageError(f"{text}: not in a folder that this studio may open ({places}); start it with --allow FOLDER")

    def close(self) -> None:
        """End the processes of the pages. Runs are not touched."""
        self.worker.close(cancel=True)
        self.answers.close()

    @staticmethod
    def _below(root: Path, text: str) -> Path | None:
        try:
            path = (root / text).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
            return None
        return path if path.is_relative_to(root) else None

    def check_source(self, text: str) -> str:
        """A data set by the name it is read under: a hub id, Parley's own, or a path made absolute.

        Raises UsageError for a path outside of the allowed folders.
        """
        if text in (DEMO_DATA, DEMO_PREFERENCES) or not is_local(text):
            return text
        return str(self.check_path(str(Path(text).expanduser().absolute())))

    def check_settings(self, config: RunConfig) -> None:
        """Raises UsageError where settings name a path outside of the allowed folders, or code to run."""
        self.check_source(config.data.source)
        if config.data.heldout is not None and config.data.heldout_share is None:
            self.check_source(config.data.heldout)
        # As `parley.models.resolve` decides: what is there is a folder, and everything else a hub id.
        if config.model.name != DEMO_MODEL and (is_local(config.model.name) or Path(config.model.name).is_dir()):
            self.check_path(str(Path(config.model.name).absolute()))
        if config.model.chat_template is not None:
            self.check_path(str(config.model.chat_template.absolute()))
        for setting, is_program in (
            ("training.rewards", not config.training.trusts_rewards),
            ("model.trust_remote_code", config.model.trust_remote_code),
        ):
            if is_program:
                raise UsageError(f"{setting}: the studio starts no code of others; start this run with parley train")
        check_revisions(config)
        for setting, path in library_paths(config):
            try:
                self.check_path(str(path))
            except UsageError as error:
                raise UsageError(f"{setting}: {error}") from None

    def start_run(self, config_yaml: str, name: str | None = None) -> str:
        """Queue a run with these settings; returns its id. Raises UsageError for settings that are wrong."""
        self.check_settings(RunConfig.create(load_yaml(config_yaml, "the settings") or {}))
        return self.queue.add(config_yaml, name)

    def start_sweep(self, config_yaml: str, values: dict[str, str], name: str | None = None) -> list[str]:
        """Queue a run for each combination of `values`; see `sweep`. Raises UsageError, and queues none then."""
        runs = sweep(config_yaml, values)
        for _, text in runs:
            self.check_settings(RunConfig.create(load_yaml(text, "the settings") or {}))
        return [self.queue.add(text, f"{name}-{suffix}" if name else suffix) for suffix, text in runs]
