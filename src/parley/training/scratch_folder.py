"""The run folder of the processes that write none: a temporary folder, so that every process runs the same program."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from parley.config import RunConfig
from parley.models.save_sharded import save_sharded
from parley.models.sharding import is_sharded
from parley.training.run_folder import RunFolder


class ScratchFolder(RunFolder):
    """Takes a process's event log and report, and no weights. `unlock` removes it.

    Args:
        shown: the run folder that the main process writes, for messages.
    """

    def __init__(self, shown: Path) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="parley-process-")))
        self.shown = shown

    @property
    def resume_command(self) -> str:
        return f"parley train --resume {self.shown}"

    def write_config(self, config: RunConfig) -> None:
        pass

    def save_weights(self, model: Any, tokenizer: Any, full: bool) -> Path:
        if full and is_sharded(model):
            save_sharded(model, None)  # the main process writes what all of them gather
        return self.shown / ("model" if full else "adapter")

    def discard(self) -> None:
        self.unlock()

    def unlock(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
